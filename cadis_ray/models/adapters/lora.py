"""Low-rank adapters (Hu et al. 2022) through peft, also on the q and v inside timm's fused qkv."""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from cadis_ray.errors import DataError, UsageError
from cadis_ray.models.classifiers.classifier import Classifier
from cadis_ray.models.sharding import like, whole

# Where the attention has three linear layers, libraries give them one of these names.
ALIASES = {"q": ("query", "q_proj"), "k": ("key", "k_proj"), "v": ("value", "v_proj")}


class SplitQKV(nn.Module):
    """The function of a fused qkv ``nn.Linear``, in three: ``q``, ``k`` and ``v``."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        weights = fused.weight.detach().chunk(3)
        biases = (None,) * 3 if fused.bias is None else fused.bias.detach().chunk(3)
        self.q, self.k, self.v = map(_linear, weights, biases)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.q(tokens), self.k(tokens), self.v(tokens)], dim=-1)

    def fused(self) -> nn.Linear:
        """One ``nn.Linear`` again, once the adapters are merged."""
        parts = (self.q, self.k, self.v)
        bias = None if self.q.bias is None else torch.cat([part.bias.detach() for part in parts])
        return _linear(torch.cat([part.weight.detach() for part in parts]), bias)


def add_lora(
    classifier: Classifier, *, r: int, lora_alpha: float | None, target_modules: tuple[str, ...], seed: int
) -> Classifier:
    """A copy whose ``target_modules`` carry adapters of rank ``r``; only they and the heads train.

    ``target_modules``: last parts of module names, as in peft; "q", "k" and "v" also name the parts of a
    fused qkv, and query, key and value under transformers' names. The update is (lora_alpha / r) B A, a true
    division; ``lora_alpha`` None means r. A is Kaiming-uniform, a function of ``seed``, and B zero: the copy
    computes what ``classifier`` does.

    Raises UsageError where the model has none of ``target_modules``, or a qkv that cannot be split.
    """
    adapted = copy.deepcopy(classifier)
    backbone = adapted.backbone
    if {"q", "k", "v"} & set(target_modules):
        _split_qkv(backbone)
    linear = {name.split(".")[-1] for name, part in backbone.named_modules() if isinstance(part, nn.Linear)}
    names = [f".{name}" for name, _ in backbone.named_modules()]
    meant = {
        target: [name for name in (target, *ALIASES.get(target, ())) if any(n.endswith(f".{name}") for n in names)]
        for target in target_modules
    }
    if absent := [target for target, found in meant.items() if not found]:
        raise UsageError(
            f"finetuning.lora.target_modules: the classifier has no {', '.join(absent)}; "
            f"its linear layers end in {', '.join(sorted(linear))}"
        )
    settings = LoraConfig(
        r=r,
        # peft declares an integer but divides as floats.
        lora_alpha=r if lora_alpha is None else lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=[name for found in meant.values() for name in found],
        modules_to_save=list(adapted.heads),
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        adapted.backbone = get_peft_model(backbone, settings)  # pyright: ignore[reportArgumentType]
    return adapted


def merge_lora(classifier: Classifier) -> Classifier:
    """A copy with the adapters added into the weights, qkv fused: keys as before ``add_lora``.

    A classifier without adapters is copied as it is.
    """
    merged = copy.deepcopy(classifier)
    if isinstance(merged.backbone, PeftModel):
        merged.backbone = merged.backbone.merge_and_unload()  # pyright: ignore[reportCallIssue]
    for name, part in list(merged.named_modules()):
        if isinstance(part, SplitQKV):
            merged.set_submodule(name, part.fused())
    return merged


def trainable_parameters(module: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def trainable_state(classifier: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of all that training changes: trained parameters, and running statistics if any."""
    return {key: whole(value) for key, value in _trained(classifier).items()}


def load_trainable_state(classifier: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts a ``trainable_state`` back; names and shapes must agree, else DataError and nothing changes."""
    trained = _trained(classifier)
    wrong = sorted(
        key
        for key in trained.keys() | state.keys()
        if key not in trained or key not in state or trained[key].shape != state[key].shape
    )
    if wrong:
        raise DataError(
            f"fine-tuned weights of another model: {len(wrong)} tensors ({len(trained)} expected) are missing, "
            f"unknown or of another shape: {', '.join(wrong[:3])}; use the settings they were trained with"
        )
    with torch.no_grad():
        for key, value in state.items():
            trained[key].copy_(like(value, trained[key]))


def _trained(classifier: nn.Module) -> dict[str, Tensor]:
    state = classifier.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if value.requires_grad or type(value) is Tensor}


def _split_qkv(backbone: nn.Module) -> None:
    for name, part in list(backbone.named_modules()):
        fused = getattr(part, "qkv", None)
        if not isinstance(fused, nn.Linear):
            continue
        if getattr(part, "q_bias", None) is not None:
            # BEiT and EVA then read qkv.weight themselves, unless told to add the bias after calling qkv.
            if not hasattr(part, "qkv_bias_separate"):
                raise UsageError(
                    f"finetuning.lora.target_modules: {name}.qkv ({type(part).__name__}) cannot be split "
                    "into q, k and v; target qkv as a whole"
                )
            cast(Any, part).qkv_bias_separate = True
        part.qkv = SplitQKV(fused)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return linear
