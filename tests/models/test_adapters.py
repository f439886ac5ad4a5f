"""Deep prompts and series adapters: what trains, what they do to the function, and what a checkpoint holds."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from cadis_ray.errors import UsageError
from cadis_ray.finetuning.base_classifier import adapted_classifier, load_finetuned, model_identity
from cadis_ray.finetuning.checkpoint import WEIGHTS, save_checkpoint
from cadis_ray.finetuning.optimiser import layer_ids, make_optimiser
from cadis_ray.models.adapters.lora import trainable_parameters
from cadis_ray.models.adapters.vit import add_prompts, add_series
from cadis_ray.models.checkpoints import read_state
from cadis_ray.models.classifiers.classifier import Classifier, load_classifier
from cadis_ray.study.load import load_study
from cadis_ray.study.study import configuration
from tests.helpers.places import DIGITS

SMALL: dict[str, Any] = {"img_size": 32, "num_classes": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
STUDY = load_study(DIGITS)


def small(name: str = "vit_tiny_patch16_224", **config: Any) -> Classifier:
    torch.manual_seed(0)
    return load_classifier("timm", name, None, SMALL | config, "half")


def test_parameter_counts_of_the_papers() -> None:
    """PEFTSmoothing on ViT-B/16 with 10 classes: 929,290 with 100 prompts at each of 12 layers."""
    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224", num_classes=10)
        classifier = Classifier(backbone, image_size=(224, 224))
        assert trainable_parameters(add_prompts(classifier, tokens=100, seed=0)) == 929_290
        series = 12 * 2 * (2 * 768 * 64 + 64 + 768) + 7_690
        assert trainable_parameters(add_series(classifier, bottleneck=64, seed=0)) == series


@pytest.mark.parametrize("config", [{}, {"reg_tokens": 2}, {"global_pool": "avg", "class_token": False}])
def test_prompts_that_get_no_attention_leave_the_logits(config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """They act through attention alone: their own outputs never reach the next block."""
    base = small(**config)
    prompted = add_prompts(base, tokens=5, seed=1).eval()
    attention, prefix = F.scaled_dot_product_attention, int(base.backbone.num_prefix_tokens)  # type: ignore[arg-type]

    def without(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        weights = torch.zeros(1, k.shape[-2])
        weights[:, prefix : prefix + 5] = -torch.inf
        return attention(q, k, v, attn_mask=weights.expand(q.shape[-2], -1))

    with torch.inference_mode():
        plain, moved = base(IMAGES), prompted(IMAGES)
        monkeypatch.setattr(F, "scaled_dot_product_attention", without)
        unseen = prompted(IMAGES)
    assert torch.allclose(unseen, plain, atol=1e-5)
    assert (moved - plain).abs().max() > 1e-4


def test_every_layer_has_prompts_of_its_own_within_their_bound() -> None:
    prompted = add_prompts(small(), tokens=50, seed=1)
    blocks = prompted.backbone.get_submodule("blocks")
    drawn = [block.get_parameter("prompts") for block in blocks.children()]
    bound = (6 / (3 * 16 * 16 + 24)) ** 0.5
    assert all(0.9 * bound < prompts.abs().max() <= bound for prompts in drawn)
    assert not torch.equal(drawn[0], drawn[1])
    again = add_prompts(small(), tokens=50, seed=1).backbone.get_parameter("blocks.0.prompts")
    assert torch.equal(drawn[0], again)
    assert layer_ids(prompted)["backbone.blocks.2.prompts"] == 3


def test_series_adapters_begin_as_the_same_function_and_add_their_update() -> None:
    base = small()
    model = add_series(base, bottleneck=6, seed=1).eval()
    mlp = model.backbone.get_submodule("blocks.1.mlp")
    tokens = torch.randn(2, 5, 24)
    with torch.inference_mode():
        assert torch.equal(model(IMAGES), base(IMAGES))
    with torch.no_grad():
        for name, parameter in mlp.named_parameters():
            if name.startswith(("up", "down")):
                parameter.normal_()
    inner = base.backbone.get_submodule("blocks.1.mlp")(tokens)
    down, up = mlp.get_submodule("down"), mlp.get_submodule("up")
    middle = F.gelu(inner @ down.weight.T + down.bias)  # type: ignore[operator]
    assert torch.allclose(mlp(tokens), inner + middle @ up.weight.T + up.bias, atol=1e-5)  # type: ignore[operator]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".up." in name or ".down." in name or ".head." in name for name in trained)
    assert len(trained) == 3 * 2 * 4 + 2


@pytest.mark.parametrize("adapter", ["lora", "prompt", "series", "full"])
def test_a_checkpoint_brings_back_what_was_trained(adapter: str, tmp_path: Path) -> None:
    changes = {"finetuning.recipe": "peft_smoothing", "finetuning.adapter": adapter, "finetuning.prompt.tokens": 3}
    chosen = configuration(STUDY, changes)
    classifier = adapted_classifier(chosen, seed=4)
    optimiser = make_optimiser(classifier, chosen.finetuning)
    images, generator = torch.randn(4, 1, 8, 8), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_checkpoint(tmp_path, classifier, optimiser, chosen, seed=4, epoch=1)
    loaded = load_finetuned(chosen, tmp_path)
    with torch.inference_mode():
        assert torch.allclose(loaded(images), classifier.eval()(images), atol=1e-5)
        assert not torch.allclose(loaded(images), load_finetuned(chosen, None)(images), atol=1e-2)
    held = sum(value.numel() for value in read_state(tmp_path / WEIGHTS).values())
    assert held == trainable_parameters(classifier)
    more = configuration(STUDY, changes | {"finetuning.prompt.tokens": 4})
    assert (model_identity(chosen, tmp_path) != model_identity(more, tmp_path)) == (adapter == "prompt")


def test_other_models_are_refused_with_what_would_do() -> None:
    resnet = load_classifier("resnet", "resnet20", None, {"num_classes": 4}, "half")
    with pytest.raises(UsageError, match=r"needs a vision transformer of timm.*lora or full"):
        add_prompts(resnet, tokens=1, seed=0)
