"""Resizing, normalisation and loading of classifiers."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from cadis_ray.errors import DataError, UsageError
from cadis_ray.models.classifiers.classifier import Classifier, evaluation, load_classifier

DIGITS: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
}
VIT = "vit_tiny_patch16_224"


def test_images_of_the_backbones_size_pass_untouched() -> None:
    images = torch.rand(3, 2, 5, 7) * 2 - 1
    assert torch.equal(Classifier(nn.Identity(), image_size=(5, 7))(images), images)


def test_resizing_is_bicubic_with_antialiasing() -> None:
    """Oracle: the separable cubic kernel (a = -1/2) of PIL and of torchvision's antialias, summed by hand."""

    def cubic(x: torch.Tensor) -> torch.Tensor:
        x = x.abs()
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))

    def weights(size: int, to: int) -> torch.Tensor:
        ratio = max(size / to, 1.0)
        centre = (torch.arange(to, dtype=torch.float64)[:, None] + 0.5) * size / to
        raw = cubic((torch.arange(size, dtype=torch.float64) + 0.5 - centre) / ratio)
        return raw / raw.sum(1, keepdim=True)

    images = torch.rand(2, 3, 12, 6, dtype=torch.float64) * 2 - 1
    resized = Classifier(nn.Identity(), image_size=(5, 9)).double()(images)
    expected = weights(12, 5) @ images @ weights(6, 9).T
    torch.testing.assert_close(resized, expected, atol=1e-6, rtol=0)


def test_normalisation_means_what_the_model_means_by_it() -> None:
    """(x01 - mean) / std on images that come as 2 * x01 - 1."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = torch.rand(4, 3, 6, 6)
    classifier = Classifier(nn.Identity(), image_size=(6, 6), mean=mean, std=std)
    expected = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(classifier(2 * pixels - 1), expected, atol=1e-5, rtol=1e-5)
    assert classifier.state_dict() == {}


@pytest.mark.parametrize(
    ("name", "config", "normalise", "scale"),
    [
        ("deit_tiny_patch16_224", {"num_classes": 4}, "own", [0.5 / 0.229, 0.5 / 0.224, 0.5 / 0.225]),
        ("deit_tiny_patch16_224", {"num_classes": 4}, "half", [1.0]),
        ("deit_tiny_patch16_224", {"num_classes": 4, "in_chans": 1}, "own", [1.0]),
        (VIT, DIGITS, "own", [1.0]),
    ],
)
def test_own_and_half_normalisation(name: str, config: dict[str, Any], normalise: Any, scale: list[float]) -> None:
    classifier = load_classifier("timm", name, None, config, normalise)
    assert classifier.scale.flatten().tolist() == pytest.approx(scale)
    assert not classifier.training
    assert classifier.heads == ("head",)
    assert classifier.image_size == ((8, 8) if config is DIGITS else (224, 224))


def test_loads_a_checkpoint_strictly(tmp_path: Path) -> None:
    source = timm.create_model(VIT, **DIGITS)
    path = tmp_path / "digits.safetensors"
    save_file(source.state_dict(), path)
    classifier = load_classifier("timm", VIT, str(path), DIGITS, "own")
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    assert torch.equal(classifier(images), source.eval()(images))
    assert classifier(torch.rand(2, 1, 16, 16)).shape == (2, 10)
    with pytest.raises(DataError, match=r"head\.weight"):
        load_classifier("timm", VIT, str(path), DIGITS | {"num_classes": 7}, "own")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("vit_tiny_patch16_24", {}, r"near: .*vit_tiny_patch16_224"),
        (VIT, {"image_size": 8}, "image_size"),
        (f"{VIT}.no_such_tag", {}, "no_such_tag"),
    ],
)
def test_models_that_timm_cannot_make(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_classifier("timm", name, None, config, "own")


def test_a_folder_of_the_hub_brings_its_weights_and_its_constructor(tmp_path: Path) -> None:
    config: dict[str, Any] = {"img_size": 32, "num_classes": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    source = timm.create_model("deit_tiny_patch16_224", **config).eval()
    timm.models.save_for_hf(source, str(tmp_path), model_args=config, safe_serialization=True)
    classifier = load_classifier("timm", f"local-dir:{tmp_path}", None, {}, "half")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert classifier.image_size == (32, 32)
    assert torch.equal(classifier(images), source(images))
    own = load_classifier("timm", f"local-dir:{tmp_path}", None, {}, "own")
    assert own.scale.flatten().tolist() == pytest.approx([0.5 / 0.229, 0.5 / 0.224, 0.5 / 0.225])
    with pytest.raises(DataError, match=r"head\.weight \[4, 24\] instead of \[7, 24\]"):
        load_classifier("timm", f"local-dir:{tmp_path}", None, {"num_classes": 7}, "own")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no weights"):
        load_classifier("timm", f"local-dir:{tmp_path}", None, {}, "own")


def test_a_checkpoint_goes_before_the_folders_weights(tmp_path: Path) -> None:
    timm.models.save_for_hf(timm.create_model(VIT, **DIGITS), str(tmp_path), model_args=DIGITS)
    other = timm.create_model(VIT, **DIGITS).eval()
    path = tmp_path / "fine_tuned.pt"
    torch.save({"model": {f"module.{key}": value for key, value in other.state_dict().items()}}, path)
    classifier = load_classifier("timm", f"local-dir:{tmp_path}", str(path), {}, "own", prefix="module.")
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    assert torch.equal(classifier(images), other(images))
    with pytest.raises(DataError, match=r"only the prefix 'module\.' differs"):
        load_classifier("timm", f"local-dir:{tmp_path}", str(path), {}, "own")


def test_nothing_is_downloaded_unasked() -> None:
    with pytest.raises(DataError, match=r"not in the local hub cache.*download: true"):
        load_classifier("timm", "hf-hub:timm/no_such_model_here", None, {}, "own")
    with pytest.raises(UsageError, match=r"got 'keras'; allowed: timm, transformers, resnet"):
        load_classifier("keras", VIT, None, {}, "own")  # type: ignore[arg-type]


def test_heads_are_found_wherever_timm_keeps_them() -> None:
    config = {"num_classes": 4}
    assert load_classifier("timm", "resnet18", None, config, "own").heads == ("fc",)
    distilled = load_classifier("timm", "deit_tiny_distilled_patch16_224", None, config, "own")
    assert distilled.heads == ("head", "head_dist")


def test_evaluation_gives_every_part_its_mode_back_even_after_an_error() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Dropout())
    module[1].eval()
    inside = []
    with contextlib.suppress(KeyError), evaluation(module):
        inside = [part.training for part in module.modules()]
        raise KeyError
    assert inside == [False, False, False]
    assert [part.training for part in module.modules()] == [True, True, False]
