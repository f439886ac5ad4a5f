"""Classifiers of transformers: from a folder as the hub lays it out, from a model type, and with adapters."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from cadis_ray.errors import DataError, EnvironmentProblem, UsageError
from cadis_ray.finetuning.recipes.ft_cadis import ft_cadis_loss
from cadis_ray.models.adapters.lora import add_lora, merge_lora, trainable_parameters
from cadis_ray.models.classifiers.classifier import Classifier, load_classifier
from cadis_ray.models.classifiers.hugging_face import HuggingFace, make_hugging_face

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
QUERY = "vit.encoder.layer.0.attention.attention.query.weight"  # as files on the hub have it


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "vit"
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**SMALL)).save_pretrained(path)
    (path / "preprocessor_config.json").write_text('{"image_mean": [0.2, 0.3, 0.4], "image_std": [0.5, 0.6, 0.7]}')
    return path


def load(name: str, checkpoint: str | None = None, normalise: Any = "half", **options: Any) -> Classifier:
    config = options.pop("config", {})
    return load_classifier("transformers", name, checkpoint, config, normalise, **options)


def test_a_folder_of_the_hub_answers_as_transformers_does(folder: Path) -> None:
    assert QUERY in load_file(folder / "model.safetensors")
    classifier = load(f"local-dir:{folder}", normalise="own")
    theirs = ViTForImageClassification.from_pretrained(folder).eval()
    mean, std = torch.tensor([0.2, 0.3, 0.4]), torch.tensor([0.5, 0.6, 0.7])
    pixels = ((IMAGES + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(classifier(IMAGES), theirs(pixels).logits)
        assert torch.equal(load(f"local-dir:{folder}")(IMAGES), theirs(IMAGES).logits)
    assert classifier.image_size == (16, 16)
    assert classifier.heads == ("model.classifier",)
    assert not classifier.training


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_go_in_and_out_under_the_hubs_names(folder: Path, tmp_path: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    classifier = load(f"local-dir:{folder}")
    assert isinstance(classifier.backbone, HuggingFace)
    out = classifier.backbone.hub_state()
    assert out.keys() == state.keys()
    assert all(torch.equal(out[key], state[key]) for key in state)
    (folder / "model.safetensors").unlink()
    other = {key: value + 1 for key, value in state.items()}
    checkpoint = tmp_path / name
    save_file(other, checkpoint) if name.endswith("safetensors") else torch.save(other, checkpoint)
    loaded = load("vit", str(checkpoint), config=SMALL)
    assert torch.equal(loaded.state_dict()["backbone.model.classifier.bias"], other["classifier.bias"])
    assert all(torch.equal(loaded.backbone.hub_state()[key], value) for key, value in other.items())  # type: ignore
    checkpoint.rename(folder / name)
    again = load(f"local-dir:{folder}")
    with torch.no_grad():
        assert torch.equal(again(IMAGES), loaded(IMAGES))


def test_another_architecture_is_refused_with_the_first_differing_keys(folder: Path, tmp_path: Path) -> None:
    path = str(folder / "model.safetensors")
    with pytest.raises(DataError, match=r"another architecture[^!]*of another shape: classifier\.bias \[5\].*\[6\]"):
        load("vit", path, config=SMALL | {"num_labels": 6})
    with pytest.raises(DataError, match=r"16 missing: vit.*16 unexpected|missing: vit\.layers\.2"):
        load("vit", path, config=SMALL | {"num_hidden_layers": 3})
    with pytest.raises(DataError, match="unexpected: vit"):
        load("vit", path, config=SMALL | {"num_hidden_layers": 1})
    state = {f"classifier.{key}": value for key, value in load_file(path).items()}
    torch.save({"state_dict": state}, tmp_path / "official.pth.tar")
    with pytest.raises(DataError, match=r"unexpected: classifier\.classifier\.bias[^!]*begins with 'classifier\.'"):
        load("vit", str(tmp_path / "official.pth.tar"), config=SMALL)
    loaded = load("vit", str(tmp_path / "official.pth.tar"), config=SMALL, prefix="classifier.")
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), load(f"local-dir:{folder}")(IMAGES))


def test_refused_weights_change_nothing_and_are_reported_once(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    backbone, _ = make_hugging_face("vit", None, SMALL)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = load_file(folder / "model.safetensors")
    state.pop("classifier.bias")
    with pytest.raises(DataError, match=r"1 missing: classifier\.bias"):
        backbone.load_hub_state(state, "here")
    assert capfd.readouterr() == ("", "")
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("described", "mean", "std"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, 0.5, 0.25),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_normalize": False}, 0.0, 1.0),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "rescale_factor": 1 / 127.5}, 0.25, 0.125),
        ({"image_mean": [102.0] * 3, "image_std": [51.0] * 3, "do_rescale": False}, 0.4, 0.2),
    ],
)
def test_own_normalisation_is_on_the_scale_the_folder_says(
    folder: Path, described: dict[str, Any], mean: float, std: float
) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    classifier = load(f"local-dir:{folder}", normalise="own")
    assert classifier.scale.flatten().tolist() == pytest.approx([0.5 / std] * classifier.scale.numel())
    assert classifier.shift.flatten().tolist() == pytest.approx([(0.5 - mean) / std] * classifier.shift.numel())


def test_size_of_models_that_take_any(folder: Path) -> None:
    config = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    classifier = load("resnet", config=config | {"image_size": 24})
    assert classifier.image_size == (24, 24)
    assert classifier.heads == ("model.classifier",)
    with torch.no_grad():
        assert classifier(IMAGES).shape == (3, 3)
    with pytest.raises(UsageError, match="set image_size"):
        load("resnet", config=config)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("vitt", {}, r"no model type 'vitt'; near: .*vit.*OWNER/NAME.*local-dir:FOLDER"),
        ("bert", {}, "BertConfig has no image classifier"),
        ("vit", {"num_label": 5}, "no num_label; near: .*num_"),
        ("vit", {"_attn_implementation": "eager"}, "no _attn_implementation"),
        ("vit", {"hidden_size": "wide"}, "cannot make it"),
        ("vit", SMALL | {"hidden_size": -24}, "cannot make it"),
        ("convnext", {"drop_path_rate": 0.1, "num_labels": 0}, "num_labels = 0"),
    ],
)
def test_models_that_transformers_cannot_make(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(name, config=config)


def test_own_normalisation_needs_to_be_told(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"preprocessor_config\.json.*normalise: half"):
        load("vit", config=SMALL, normalise="own")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "preprocessor_config.json").write_text('{"size": 16}')
    with pytest.raises(DataError, match="no lists image_mean"):
        load(f"local-dir:{folder}", normalise="own")


def test_folders_that_are_not_classifiers(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load(f"local-dir:{tmp_path}/nowhere")
    with pytest.raises(DataError, match=r"no config\.json"):
        load(f"local-dir:{tmp_path}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no weights; need one of model\.safetensors, pytorch_model\.bin"):
        load(f"local-dir:{folder}")
    (folder / "config.json").write_text('{"model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}')
    with pytest.raises(DataError, match="no model type 'new'"):
        load(f"local-dir:{folder}")
    (folder / "config.json").write_text("[")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        load(f"local-dir:{folder}")


def test_a_hub_name_is_looked_up_in_the_cache_and_nowhere_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("me/vit", "hf-hub:me/vit", "hf-hub:me/vit@v2"):
        with pytest.raises(DataError, match=r"not in the local hub cache.*download: true.*local-dir:FOLDER"):
            load(name)
    model = tmp_path / "cache" / "models--me--vit"
    (model / "refs").mkdir(parents=True)
    (model / "snapshots").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    folder.rename(model / "snapshots" / ("0" * 40))
    with torch.no_grad():
        assert torch.equal(load("me/vit", normalise="own")(IMAGES), load("hf-hub:me/vit", normalise="own")(IMAGES))
    with pytest.raises(DataError, match="not in the local hub cache"):
        load("me/vit@v2")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentProblem, match=r"me/other: cannot be downloaded: .*refused"):
        load("me/other", download=True)


@pytest.mark.parametrize(("classes", "head"), [(1000, 769_000), (10, 7_690)])
def test_rank_4_on_vit_base_has_the_papers_parameters(classes: int, head: int) -> None:
    with torch.device("meta"):
        backbone, takes = make_hugging_face("vit", None, {"num_labels": classes})
        classifier = Classifier(backbone, image_size=takes.size, heads=backbone.heads())
        adapted = add_lora(classifier, r=4, lora_alpha=None, target_modules=("q", "v"), seed=0)
    assert takes.size == (224, 224)
    assert sum(p.numel() for p in backbone.parameters()) == 85_798_656 + head
    assert trainable_parameters(adapted) == 147_456 + head


def test_function_is_kept_by_adding_and_by_merging(folder: Path) -> None:
    base = load(f"local-dir:{folder}")
    model = add_lora(base, r=3, lora_alpha=4.5, target_modules=("q", "v"), seed=1)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), base(IMAGES))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert ".lora_" in name or ".classifier." in name
                parameter += 0.05 * torch.randn_like(parameter)
        merged = merge_lora(model)
        torch.testing.assert_close(merged(IMAGES), model(IMAGES), atol=1e-5, rtol=0)
        assert (merged(IMAGES) - base(IMAGES)).abs().max() > 0.01
    changed = {key for key, value in merged.state_dict().items() if not torch.equal(value, base.state_dict()[key])}
    parts = {key.removeprefix("backbone.model.") for key in changed}
    layers = {f"vit.layers.{layer}.attention.{part}_proj.weight" for layer in (0, 1) for part in "qv"}
    assert parts == layers | {"classifier.weight", "classifier.bias"}


def test_a_step_of_ft_cadis_trains_adapters_and_head(folder: Path) -> None:
    model = add_lora(load(f"local-dir:{folder}"), r=2, lora_alpha=None, target_modules=("q", "v"), seed=1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    denoised = (IMAGES + 0.1 * torch.randn(2, *IMAGES.shape)).clamp(-1, 1)
    loss = None
    for _ in range(2):  # the first leaves A, behind a B of zeros, without gradient
        loss = ft_cadis_loss(model, IMAGES, denoised, torch.tensor([0, 1, 2]), adv_weight=1.0, attack_radius=0.25,
                             attack_steps=1, mask="none")  # fmt: skip
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    assert loss is not None
    assert loss.madv > 0
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained)
    with torch.no_grad():
        torch.testing.assert_close(merge_lora(model)(IMAGES), model(IMAGES), atol=1e-5, rtol=0)


def test_drop_path_leaves_out_whole_branches_in_training_only() -> None:
    """One token's path: of a one-in-two branch that adds 1, kept samples get 2 and the others nothing."""
    torch.manual_seed(0)
    plain, _ = make_hugging_face("vit", None, SMALL)
    dropping, _ = make_hugging_face("vit", None, SMALL | {"drop_path_rate": 0.5})
    dropping.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(IMAGES), dropping.eval()(IMAGES))
    branches = [layer.get_submodule("dropout") for layer in dropping.model.get_submodule("vit.layers").children()]
    branch = torch.ones(400, 17, 24)
    first, second = (part.train()(branch) for part in branches)
    assert torch.equal(first, branch), "the rate rises from 0"
    assert set(second.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(second, second[:, :1, :1].expand_as(second)), "dropped in part"
    assert 150 < (second[:, 0, 0] == 0).sum() < 250


def test_drop_path_of_models_that_have_or_lack_it() -> None:
    small = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_labels": 3, "image_size": 32}
    backbone, _ = make_hugging_face("convnext", None, small | {"drop_path_rate": 0.3})
    assert backbone.model.config.to_dict()["drop_path_rate"] == 0.3
    resnet = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "image_size": 32}
    with pytest.raises(UsageError, match="ResNetForImageClassification has no drop path"):
        make_hugging_face("resnet", None, resnet | {"drop_path_rate": 0.3})


def test_gradients_reach_the_images(folder: Path) -> None:
    images = IMAGES.clone().requires_grad_()
    load(f"local-dir:{folder}")(images).sum().backward()
    assert isinstance(images.grad, Tensor)
    assert images.grad.abs().max() > 0
