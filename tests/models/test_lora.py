"""Adapters: the function before and after, what trains, and what a checkpoint of them holds."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from cadis_ray.errors import DataError, UsageError
from cadis_ray.models.adapters.lora import (
    add_lora,
    load_trainable_state,
    merge_lora,
    trainable_parameters,
    trainable_state,
)
from cadis_ray.models.classifiers.classifier import Classifier, load_classifier

SMALL: dict[str, Any] = {"img_size": 32, "num_classes": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def small(name: str = "vit_tiny_patch16_224") -> Classifier:
    torch.manual_seed(0)
    return load_classifier("timm", name, None, SMALL, "half")


def adapted(classifier: Classifier, r: int = 3, **changed: Any) -> Classifier:
    settings: dict[str, Any] = {"lora_alpha": None, "target_modules": ("q", "v"), "seed": 5}
    return add_lora(classifier, r=r, **settings | changed)


def disturb(classifier: nn.Module) -> None:
    """As if trained: B is no longer zero, the head another one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("r", "classes", "expected"),
    [(4, 1000, 147_456 + 769_000), (4, 10, 147_456 + 7_690), (2, 10, 81_418)],
)
def test_parameter_counts_of_the_papers(r: int, classes: int, expected: int) -> None:
    """FT-CADIS: 147,456 + head at rank 4 on ViT-B/16; PEFTSmoothing: 81,418 with 10 classes at rank 2."""
    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224", num_classes=classes)
        classifier = Classifier(backbone, image_size=(224, 224))
        assert trainable_parameters(adapted(classifier, r=r)) == expected


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("alpha", [None, 4.5])
def test_function_is_kept_by_adding_and_by_merging(name: str, alpha: float | None) -> None:
    base = small(name)
    if name.startswith("beit"):
        with torch.no_grad():  # zero when made: give the separate biases something to get wrong
            for block in base.backbone.get_submodule("blocks").children():
                for bias in ("q_bias", "v_bias"):
                    block.get_submodule("attn").get_parameter(bias).normal_(std=0.5)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = adapted(base, lora_alpha=alpha).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(IMAGES), base(IMAGES), atol=1e-6, rtol=1e-5)
    disturb(model)
    with torch.inference_mode():
        trained = model(IMAGES)
        assert (trained - base(IMAGES)).abs().max() > 0.01
        merged = merge_lora(model)
        torch.testing.assert_close(merged(IMAGES), trained, atol=1e-5, rtol=0)
        assert torch.equal(model(IMAGES), trained), "merging changed the adapted model"
    assert {key: value.shape for key, value in merged.state_dict().items()} == {
        key: value.shape for key, value in before.items()
    }
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    changed = {key for key, value in merged.state_dict().items() if not torch.equal(value, before[key])}
    expected = {key for key in before if ".qkv.weight" in key or ".head." in key}
    assert changed == expected


@pytest.mark.parametrize(("r", "alpha", "scale"), [(4, None, 1.0), (4, 2.0, 0.5), (3, 4.0, 4 / 3)])
def test_scale_is_a_true_division(r: int, alpha: float | None, scale: float) -> None:
    """delta W = (lora_alpha / r) B A on q and v, nothing on k."""
    base = small()
    model = adapted(base, r=r, lora_alpha=alpha)
    disturb(model)
    part = "backbone.base_model.model.blocks.1.attn.qkv"
    state = model.state_dict()
    a, b = (state[f"{part}.v.lora_{matrix}.default.weight"] for matrix in "AB")
    key = "backbone.blocks.1.attn.qkv.weight"
    change = merge_lora(model).state_dict()[key] - base.state_dict()[key]
    torch.testing.assert_close(change[48:], scale * b @ a, atol=1e-6, rtol=1e-5)
    assert torch.equal(change[24:48], torch.zeros(24, 24))
    assert change[:24].abs().max() > 1e-4


def test_initialisation_is_a_function_of_the_seed() -> None:
    base = small()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = trainable_state(adapted(base))
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers were used up"
    torch.rand(100)
    second, other = trainable_state(adapted(base)), trainable_state(adapted(base, seed=6))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first if "lora_A" in key)


def test_state_holds_what_trains_and_restores_the_function() -> None:
    base = small()
    model = adapted(base)
    disturb(model)
    state = trainable_state(model)
    assert sum(value.numel() for value in state.values()) == trainable_parameters(model)
    assert all(".lora_" in key or ".head." in key for key in state)
    fresh = adapted(base, seed=99)
    load_trainable_state(fresh, state)
    assert torch.equal(fresh.eval()(IMAGES), model.eval()(IMAGES))
    disturb(model)
    assert not torch.equal(state[next(iter(state))], trainable_state(model)[next(iter(state))]), "not a copy"


def test_full_fine_tuning_keeps_running_statistics() -> None:
    torch.manual_seed(0)
    model = Classifier(nn.Sequential(nn.Conv2d(3, 4, 32), nn.BatchNorm2d(4), nn.Flatten()), image_size=(32, 32))
    model.train()(IMAGES)
    state = trainable_state(model)
    torch.manual_seed(1)
    fresh = Classifier(nn.Sequential(nn.Conv2d(3, 4, 32), nn.BatchNorm2d(4), nn.Flatten()), image_size=(32, 32))
    load_trainable_state(fresh, state)
    assert torch.equal(fresh.eval()(IMAGES), model.eval()(IMAGES))
    assert torch.equal(merge_lora(model)(IMAGES), model(IMAGES))


def test_state_of_another_adapter_is_refused_and_changes_nothing() -> None:
    base = small()
    model = adapted(base)
    before = trainable_state(model)
    good = {key: value + 1 for key, value in before.items()}
    key = next(iter(good))
    for state in (
        trainable_state(adapted(base, r=2)),
        {other: good[other] for other in good if other != key},
        good | {"backbone.blocks.0.extra": torch.zeros(1)},
    ):
        with pytest.raises(DataError, match="another model"):
            load_trainable_state(model, state)
    assert all(torch.equal(value, before[key]) for key, value in trainable_state(model).items())


def test_target_modules_that_are_not_there() -> None:
    with pytest.raises(UsageError, match=r"no query, value; .*fc1.*proj.*q"):
        adapted(small(), target_modules=("query", "value"))
    model = adapted(small(), target_modules=("attn.proj", "fc1"))
    assert {name.split(".lora_")[0].split(".")[-1] for name in trainable_state(model) if "lora" in name} == {
        "proj",
        "fc1",
    }
