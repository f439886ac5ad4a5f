"""The authors' checkpoints: read, merged, written; what is not one is refused."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from cadis_ray.errors import DataError
from cadis_ray.finetuning.official import export_official, import_official
from cadis_ray.models.adapters.lora import add_lora
from cadis_ray.models.checkpoints import read_checkpoint
from cadis_ray.models.classifiers.classifier import Classifier, load_classifier
from tests.helpers.states import same_weights

VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "num_classes": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
HF: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
                      "image_size": 16, "patch_size": 4, "num_labels": 4}  # fmt: skip
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def vit(seed: int) -> Classifier:
    torch.manual_seed(seed)
    return load_classifier("timm", "vit_tiny_patch16_224", None, VIT, "half")


def hugging_face(seed: int) -> Classifier:
    torch.manual_seed(seed)
    return load_classifier("transformers", "vit", None, HF, "half")


def save(path: Path, state: dict[str, Tensor], **changed: Any) -> Path:
    """As the program does: with AdamW's state and the gradient scaler's."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimiser = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimiser.step()
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    held = {"epoch": 20, "arch": "cifar_vit_base", "state_dict": state, "optimizer": optimiser.state_dict(),
            "fp16_scaler": scaler} | changed  # fmt: skip
    torch.save(held, path)
    return path


@pytest.mark.parametrize("make", [vit, hugging_face])
def test_out_and_in_again_is_equal_bit_for_bit(tmp_path: Path, make: Any) -> None:
    source, target = make(0), make(1)
    export_official(tmp_path / "checkpoint-20.pth.tar", source, 20, "cifar_vit_base")
    assert not same_weights(source.state_dict(), target.state_dict())
    assert import_official(tmp_path / "checkpoint-20.pth.tar", target) == (20, "cifar_vit_base")
    assert same_weights(source.state_dict(), target.state_dict())
    held = read_checkpoint(tmp_path / "checkpoint-20.pth.tar")
    assert list(held) == ["epoch", "arch", "state_dict", "optimizer", "fp16_scaler"]
    key = "blocks.1.attn.qkv.weight" if make is vit else "vit.encoder.layer.1.attention.attention.query.weight"
    assert held["state_dict"][f"classifier.{key}"].dtype == torch.float32
    assert all(name.startswith("classifier.") for name in held["state_dict"])


@pytest.mark.parametrize("prefix", ["classifier.", "module.classifier.", "classifier.module."])
def test_the_programs_own_files_load(tmp_path: Path, prefix: str) -> None:
    source = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    path = save(tmp_path / "checkpoint-20.pth.tar", {prefix + k: v for k, v in source.state_dict().items()})
    classifier = vit(1)
    assert import_official(path, classifier).epoch == 20
    with torch.no_grad():
        assert torch.equal(classifier(IMAGES), source(IMAGES))


def adapted_state(source: torch.nn.Module, r: int) -> dict[str, Tensor]:
    """``source``'s weights as the program saves them with LoRA of rank ``r`` on every q and v."""
    generator = torch.Generator().manual_seed(3)
    state: dict[str, Tensor] = {}
    for key, value in source.state_dict().items():
        state["classifier.lora_vit." + key.replace(".qkv.", ".qkv.qkv.")] = value
        if key.endswith("qkv.weight"):
            for part in "qv":
                for matrix, shape in (("a", (r, 24)), ("b", (24, r))):
                    name = f"classifier.lora_vit.{key.removesuffix('weight')}linear_{matrix}_{part}.weight"
                    state[name] = 0.3 * torch.randn(shape, generator=generator)
    return state


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_programs_adapters_are_merged(tmp_path: Path, scale: float) -> None:
    """Oracle: the program's forward pass, which adds scale * B A x to the first and the last third of qkv(x)."""
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    state = adapted_state(source, r=2)
    classifier = vit(1)
    import_official(save(tmp_path / "checkpoint-5.pth.tar", state), classifier, lora_scale=scale)

    for name, block in source.get_submodule("blocks").named_children():
        own = f"classifier.lora_vit.blocks.{name}.attn.qkv."

        def adapt(_: Any, inputs: tuple[Tensor], output: Tensor, own: str = own) -> Tensor:
            q, k, v = output.chunk(3, -1)
            added = [scale * F.linear(F.linear(inputs[0], state[f"{own}linear_a_{part}.weight"]),
                                      state[f"{own}linear_b_{part}.weight"]) for part in "qv"]  # fmt: skip
            return torch.cat([q + added[0], k, v + added[1]], -1)

        block.get_submodule("attn.qkv").register_forward_hook(adapt)
    with torch.no_grad():
        expected = source(IMAGES)
        torch.testing.assert_close(classifier(IMAGES), expected, atol=1e-5, rtol=1e-4)
        assert (vit(0)(IMAGES) - expected).abs().max() > 0.01


def test_adapters_of_ours_are_exported_merged(tmp_path: Path) -> None:
    base = vit(0)
    model = add_lora(base, r=2, lora_alpha=None, target_modules=("q", "v"), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    export_official(tmp_path / "checkpoint-5.pth.tar", model, 5, "imagenet_vit_base")
    target = vit(1)
    import_official(tmp_path / "checkpoint-5.pth.tar", target)
    with torch.no_grad():
        torch.testing.assert_close(target(IMAGES), model.eval()(IMAGES), atol=1e-5, rtol=0)
        assert (target(IMAGES) - base(IMAGES)).abs().max() > 0.01


def test_what_is_not_such_a_checkpoint_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    classifier = vit(1)
    before = deepcopy(classifier.state_dict())
    good = {f"classifier.{key}": value for key, value in vit(0).backbone.state_dict().items()}
    bare = {key.removeprefix("classifier."): value for key, value in good.items()}
    shaped = good | {"classifier.head.weight": torch.zeros(7, 24)}
    adapters = adapted_state(vit(0).backbone, r=2)
    missing = {key: value for key, value in adapters.items() if "blocks.1.attn.qkv.linear_b_v" not in key}
    pairs = [key for key in adapters if "linear" in key and "blocks.0" in key]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"state_dict": bare}, r"do not begin with 'classifier\.'.*: cls_token.*classifier\.checkpoint"),
        ({"state_dict": shaped}, r"of another shape: head\.weight \[7, 24\] instead of \[4, 24\]"),
        ({"state_dict": {**good, "classifier.extra": torch.zeros(1)}}, "1 unexpected: extra"),
        ({"state_dict": missing}, r"adapters of blocks\.1\.attn\.qkv are incomplete"),
        ({"state_dict": adapters | {key: torch.zeros(3, 3) for key in pairs}}, r"blocks\.0\.attn\.qkv"),
        ({"state_dict": [1, 2]}, "state_dict is not a mapping"),
        ({"epoch": "last"}, "not a checkpoint of FT-CADIS"),
    ]
    for changed, message in cases:
        with pytest.raises(DataError, match=message):
            import_official(save(tmp_path / "c.pth.tar", good, **changed), classifier)
    torch.save(good, tmp_path / "bare.pth.tar")
    with pytest.raises(DataError, match=r"need epoch, arch and state_dict, got classifier\.cls_token"):
        import_official(tmp_path / "bare.pth.tar", classifier)
    with pytest.raises(DataError, match=r"another architecture"):
        import_official(save(tmp_path / "hf.pth.tar", good), hugging_face(0))
    assert same_weights(classifier.state_dict(), before)


def test_a_pickle_that_could_run_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds pathlib.*refused"):
        import_official(save(tmp_path / "c.pth.tar", {}, arch=Path("x")), vit(0))
