"""Parameter groups, schedules and clipping against closed forms."""

import math

import pytest
import timm
import torch
from torch import nn

from cadis_ray.finetuning.optimiser import (
    apply_schedule,
    clip_gradients,
    layer_ids,
    make_optimiser,
    schedule_at,
)
from cadis_ray.finetuning.settings import FineTuning
from cadis_ray.models.adapters.lora import add_lora
from cadis_ray.models.classifiers.classifier import Classifier

SETTINGS = FineTuning(
    base_lr=1e-3,
    min_lr=1e-6,
    batch_size=128,
    epochs=10,
    warmup_epochs=2.0,
    weight_decay=0.04,
    weight_decay_end=0.4,
)


def vit(depth: int = 3) -> Classifier:
    backbone = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        in_chans=1,
        num_classes=3,
        embed_dim=12,
        depth=depth,
        num_heads=2,
    )
    return Classifier(backbone, image_size=(8, 8))


def test_depth_of_every_parameter_of_a_vit() -> None:
    ids = layer_ids(vit())
    embeddings = {"cls_token": 0, "pos_embed": 0, "patch_embed.proj.weight": 0, "patch_embed.proj.bias": 0}
    ends = {"norm.weight": 4, "norm.bias": 4, "head.weight": 4, "head.bias": 4}
    for name, depth in (embeddings | ends).items():
        assert ids.pop(f"backbone.{name}") == depth
    assert set(ids.values()) == {1, 2, 3}
    assert all(f".blocks.{depth - 1}." in name for name, depth in ids.items())


def test_depth_of_adapters_and_head_and_of_other_transformers() -> None:
    adapted = add_lora(vit(), r=2, lora_alpha=None, target_modules=("q", "v"), seed=0)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name: depth for name, depth in layer_ids(adapted).items() if name in trained} == {
        **{
            f"backbone.base_model.model.blocks.{block}.attn.qkv.{part}.lora_{matrix}.default.weight": block + 1
            for block in range(3)
            for part in "qv"
            for matrix in "AB"
        },
        "backbone.base_model.model.head.modules_to_save.default.weight": 4,
        "backbone.base_model.model.head.modules_to_save.default.bias": 4,
    }
    with torch.device("meta"):
        swin = timm.create_model("swin_tiny_patch4_window7_224")
    ids = layer_ids(swin)
    assert ids["patch_embed.proj.weight"] == 0
    assert ids["layers.0.blocks.1.mlp.fc1.weight"] < ids["layers.1.blocks.0.mlp.fc1.weight"] < ids["head.fc.weight"]


def test_groups_scale_by_depth_and_decay_only_matrices() -> None:
    model = vit()
    model.backbone.get_parameter("blocks.0.mlp.fc1.weight").requires_grad_(False)
    optimiser = make_optimiser(model, SETTINGS)
    assert all(group["betas"] == (0.9, 0.999) for group in optimiser.param_groups)
    apply_schedule(optimiser, 20, 100, SETTINGS)
    rate, decay = schedule_at(20, 100, SETTINGS)
    found = {p: group for group in optimiser.param_groups for p in group["params"]}
    assert len(found) == sum(1 for p in model.parameters() if p.requires_grad)
    for name, power, decays in (
        ("cls_token", 4, False),
        ("pos_embed", 4, False),
        ("patch_embed.proj.weight", 4, True),
        ("patch_embed.proj.bias", 4, False),
        ("blocks.0.attn.qkv.weight", 3, True),
        ("blocks.2.norm1.weight", 1, False),
        ("blocks.2.mlp.fc2.bias", 1, False),
        ("norm.weight", 0, False),
        ("head.weight", 0, True),
        ("head.bias", 0, False),
    ):
        group = found[model.backbone.get_parameter(name)]
        assert group["lr"] == pytest.approx(rate * 0.65**power), name
        assert group["weight_decay"] == (decay if decays else 0), name


def test_schedule_in_closed_form() -> None:
    """10 epochs of 10 iterations, 2 of warm-up, peak 1e-3 * 128 / 256."""
    peak = 5e-4
    assert schedule_at(0, 100, SETTINGS) == pytest.approx((0.0, 0.04))
    assert schedule_at(5, 100, SETTINGS)[0] == pytest.approx(peak / 4)
    assert schedule_at(20, 100, SETTINGS)[0] == pytest.approx(peak)
    assert schedule_at(60, 100, SETTINGS)[0] == pytest.approx((peak + 1e-6) / 2)
    assert schedule_at(40, 100, SETTINGS)[0] == pytest.approx(1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule_at(100, 100, SETTINGS) == pytest.approx((1e-6, 0.4))
    assert schedule_at(50, 100, SETTINGS)[1] == pytest.approx(0.22)
    assert schedule_at(25, 100, SETTINGS)[1] == pytest.approx(0.4 - 0.36 * (1 + math.cos(math.pi / 4)) / 2)


def test_schedule_without_and_with_only_warm_up() -> None:
    assert schedule_at(0, 7, SETTINGS.model_copy(update={"warmup_epochs": 0.0}))[0] == pytest.approx(5e-4)
    longer = SETTINGS.model_copy(update={"warmup_epochs": 20.0})
    assert [schedule_at(step, 10, longer)[0] for step in (0, 5, 10)] == pytest.approx([0, 1.25e-4, 2.5e-4])


def gradients(*vectors: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(vector))) for vector in vectors]
    for parameter, vector in zip(parameters, vectors, strict=True):
        parameter.grad = torch.tensor(vector)
    return [*parameters, nn.Parameter(torch.zeros(2))]  # the last has no gradient


def test_clipping_per_tensor_and_global() -> None:
    parameters = gradients([3.0, 4.0], [0.3, 0.4], [0.0])
    assert clip_gradients(parameters, "per_tensor", 1.0).item() == pytest.approx(math.hypot(5, 0.5))
    clipped = [p.grad.tolist() for p in parameters if p.grad is not None]
    assert clipped[0] == pytest.approx([0.6, 0.8])
    assert clipped[1] == pytest.approx([0.3, 0.4])
    assert clipped[2] == [0.0]

    parameters = gradients([3.0, 4.0], [0.3, 0.4])
    oracle = gradients([3.0, 4.0], [0.3, 0.4])
    clip_gradients(parameters, "global", 1.0)
    torch.nn.utils.clip_grad_norm_(oracle, 1.0)
    for ours, theirs in zip(parameters[:2], oracle[:2], strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.tolist() == pytest.approx(theirs.grad.tolist())
    assert not clip_gradients(gradients([1.0], [math.nan]), "per_tensor", 1.0).isfinite()
