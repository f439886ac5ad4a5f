"""The CIFAR residual networks: their published sizes, their checkpoints' keys, and each block against torchvision's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from cadis_ray.errors import DataError, UsageError
from cadis_ray.models.adapters.lora import add_lora
from cadis_ray.models.classifiers.classifier import load_classifier
from cadis_ray.models.classifiers.resnet import Block, make_resnet


def randomised(module: nn.Module) -> nn.Module:
    """Running statistics too: as they are made, normalisation does nothing."""
    generator = torch.Generator().manual_seed(0)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + (0.5 if value.ndim == 1 else -0.25))
    return module.eval()


@pytest.mark.parametrize(("depth", "parameters"), [(20, 272_474), (110, 1_730_714)])
def test_size(depth: int, parameters: int) -> None:
    """269,722 and 1,727,962 of the paper's networks, and the 1x1 convolutions of two shortcuts with their norms."""
    with torch.device("meta"):
        network = make_resnet(f"resnet{depth}", {})
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_keys_are_those_of_the_fields_checkpoints() -> None:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in make_resnet("resnet110", {}).state_dict().items()}
    assert len(shapes) == 6 + 54 * 12 + 2 * 6 + 2
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected: dict[str, tuple[int, ...]] = {"conv1.weight": (16, 3, 3, 3), "fc.weight": (10, 64), "fc.bias": (10,)}
    expected |= {f"bn1.{part}": (16,) if part != "num_batches_tracked" else () for part in norm}
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(18):
            name, narrow = f"layer{stage}.{block}", width // 2 if block == 0 and stage > 1 else width
            expected |= {f"{name}.conv1.weight": (width, narrow, 3, 3), f"{name}.conv2.weight": (width, width, 3, 3)}
            norms = [f"{name}.bn1", f"{name}.bn2"]
            if narrow != width:
                expected[f"{name}.downsample.0.weight"] = (width, narrow, 1, 1)
                norms.append(f"{name}.downsample.1")
            expected |= {
                f"{n}.{part}": (width,) if part != "num_batches_tracked" else () for n in norms for part in norm
            }
    assert shapes == expected


@pytest.mark.parametrize(("channels", "width", "stride"), [(16, 16, 1), (16, 32, 2)])
def test_a_block_is_torchvisions(channels: int, width: int, stride: int) -> None:
    ours = randomised(Block(channels, width, stride))
    shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    theirs = BasicBlock(channels, width, stride, shortcut if stride > 1 else None).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, channels, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_the_whole_is_its_parts_in_order() -> None:
    network = randomised(make_resnet("resnet14", {"num_classes": 4}))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        h = torch.relu(network.get_submodule("bn1")(network.get_submodule("conv1")(x)))
        for stage, side in (("layer1", 32), ("layer2", 16), ("layer3", 8)):
            h = network.get_submodule(stage)(h)
            assert h.shape[2:] == (side, side)
        expected = network.get_submodule("fc")(nn.AvgPool2d(8)(h).flatten(1))
        torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("prefix", ["1.", "1.module.", ""])
def test_checkpoints_of_the_field_load(tmp_path: Path, prefix: str) -> None:
    """A normalising layer first, so that the network is "1."; under data parallelism "1.module."."""
    source = randomised(make_resnet("resnet20", {}))
    path = tmp_path / "checkpoint.pth.tar"
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save({"epoch": 90, "arch": "cifar_resnet20", "state_dict": state, "optimizer": {}}, path)
    classifier = load_classifier("resnet", "resnet20", str(path), {}, "own", prefix=prefix)
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    with torch.no_grad():
        expected = source((pixels - mean[:, None, None]) / std[:, None, None])
        assert (classifier(2 * pixels - 1) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not classifier.training
    if prefix:
        with pytest.raises(DataError, match=rf"only the prefix '{prefix}' differs"):
            load_classifier("resnet", "resnet20", str(path), {}, "own")
    with pytest.raises(DataError, match=r"128 of 128 keys do not begin with the prefix 'model\.'"):
        load_classifier("resnet", "resnet20", str(path), {}, "own", prefix="model.")


def test_normalisation_of_other_images_is_half() -> None:
    for classifier in (
        load_classifier("resnet", "resnet8", None, {"in_chans": 1}, "own"),
        load_classifier("resnet", "resnet8", None, {}, "half"),
    ):
        assert (classifier.scale.flatten().tolist(), classifier.shift.flatten().tolist()) == ([1.0], [0.0])
        assert classifier.image_size == (32, 32)
        assert classifier.heads == ("fc",)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("resnet18", {}, r"got 'resnet18'.*6 n \+ 2"),
        ("resnet2", {}, "resnet2"),
        ("resnet", {}, "resnet110"),
        ("resnet110", {"drop_path_rate": 0.2}, "does not take drop_path_rate: 0.2"),
        ("resnet110", {"num_classes": 0}, "num_classes: 0"),
    ],
)
def test_what_there_is_not(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_classifier("resnet", name, None, config, "own")


def test_adapters_and_downloads_have_no_place() -> None:
    with pytest.raises(UsageError, match="no q, v"):
        add_lora(load_classifier("resnet", "resnet8", None, {}, "own"), r=2, lora_alpha=None,
                 target_modules=("q", "v"), seed=0)  # fmt: skip
    with pytest.raises(UsageError, match="nothing to download"):
        load_classifier("resnet", "resnet8", None, {}, "own", download=True)
