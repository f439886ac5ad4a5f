"""The base classifier of the smoothed one: a function from x + noise to a vote, the same in search and certification.

It has two steps. The first adds the noise, and denoises where the kind wants it; it is shared by all models with the
same view. The second turns the view into logits. Whatever a recipe adds to a model acts in the second step, on
x + noise: what acted on x before the noise would void every certificate.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from cadis_ray.data.sources import image_shape
from cadis_ray.errors import UsageError
from cadis_ray.finetuning.checkpoint import WEIGHTS, read_record
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.interface.section import Section
from cadis_ray.models.adapters.coordinator import Coordinator
from cadis_ray.models.adapters.lora import add_lora, load_trainable_state, merge_lora
from cadis_ray.models.adapters.vit import add_prompts, add_series
from cadis_ray.models.black_box import BlackBox, BlackBoxModel, Trained
from cadis_ray.models.checkpoints import read_state
from cadis_ray.models.classifiers.classifier import Classifier, load_classifier
from cadis_ray.models.denoisers.diffusion import load_denoiser
from cadis_ray.models.local_smoothing import LocalSmoothing
from cadis_ray.smoothing.noise import add_noise
from cadis_ray.smoothing.sampling import Denoise
from cadis_ray.storage.identity import former, identity

View = Literal["denoised", "noisy"]


def view_of(configuration: Configuration) -> View:
    """What the second step takes, on the [-1, 1] scale: denoised images, or the noisy ones themselves."""
    return "noisy" if configuration.kind in ("classify", "black_box") else "denoised"


def load_view(base: Configuration, view: View, device: str = "cpu") -> Denoise:
    """The first step, (images, noise) -> view, with the base's sigma and denoiser."""
    if view == "noisy":
        return partial(add_noise, sigma=base.sigma)
    model = base.denoiser
    denoiser = load_denoiser(model.family, model.checkpoint, model.config).to(device)
    return partial(denoiser.denoise, sigma=base.sigma, mode=model.noise)


def as_base(configuration: Configuration, classifier: nn.Module) -> nn.Module:
    """The second step: the view (B, C, H, W) -> logits (B, K), each image by itself."""
    local = configuration.base_classifier
    if configuration.kind == "local_smoothing":
        return LocalSmoothing(classifier, local.local_noises, local.local_sigma, local.local_seed)
    return classifier


def load_base(configuration: Configuration, checkpoint: Path | None) -> nn.Module:
    """The second step with the weights to certify, in evaluation mode; ``checkpoint`` None: off the shelf."""
    return as_base(configuration, load_finetuned(configuration, checkpoint)).eval()


def base_identity(configuration: Configuration, checkpoint: Path | None, *, whole: bool = False) -> str:
    """SHA-256 of all that makes the second step what it is.

    ``whole``: as of runs whose names are hashes of whole sections, see ``storage.identity.former``.
    """
    model = model_identity(configuration, checkpoint, whole=whole)
    if configuration.kind == "denoise_then_classify":
        return model
    content: dict[str, Any] = {"kind": configuration.kind, "model": model}
    if configuration.kind == "local_smoothing":
        content |= _named(configuration.base_classifier, "base_classifier", whole, exclude={"kind"})
    return identity(content)


def view_identity(base: Configuration, view: View, *, whole: bool = False) -> str:
    """SHA-256 of all that makes the first step what it is, but for sigma; how numbers are rounded is part of it."""
    denoiser = _named(base.denoiser, "denoiser", whole) if view == "denoised" else {"view": view}
    return identity(denoiser | {"precision": base.certification.precision})


def _named(section: Section, key: str, whole: bool, **chosen: Any) -> dict[str, Any]:
    """What names a section of a configuration, now or as of whole sections."""
    return former(section.model_dump(mode="json", **chosen), f"base.{key}") if whole else section.identified(**chosen)


def adapted_classifier(configuration: Configuration, seed: int) -> Trained:
    """The off-the-shelf classifier, ready for what ``finetuning`` trains: nothing, adapters, or all of it.

    Of the kind black_box: what asks it, with a coordinator to train where the recipe is black_box_prompt.
    """
    if configuration.kind == "black_box":
        return _black_box(configuration, seed)
    settings, model = configuration.finetuning, configuration.classifier
    constructor = model.config | ({"drop_path_rate": settings.drop_path} if settings.drop_path else {})
    classifier = load_classifier(
        model.library, model.name, model.checkpoint, constructor, model.normalise,
        download=model.download, prefix=model.prefix,
    )  # fmt: skip
    if settings.recipe == "none":
        return classifier.requires_grad_(False)
    if settings.adapter == "full":
        return classifier
    if settings.adapter == "prompt":
        return add_prompts(classifier, tokens=settings.prompt.tokens, seed=seed)
    if settings.adapter == "series":
        return add_series(classifier, bottleneck=settings.series.bottleneck, seed=seed)
    lora = settings.lora
    return add_lora(classifier, r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules, seed=seed)


def _black_box(configuration: Configuration, seed: int) -> BlackBoxModel:
    asked, settings, model = configuration.black_box, configuration.finetuning, configuration.classifier
    if asked.endpoint is None or asked.classes is None:
        raise UsageError("black_box: endpoint and classes are missing; the kind black_box needs both")
    if settings.recipe not in ("none", "black_box_prompt"):
        raise UsageError(
            f"base_classifier.kind: black_box cannot be trained by the recipe {settings.recipe}; need none or "
            "black_box_prompt"
        )
    box = BlackBox(
        asked.endpoint, asked.classes, timeout=asked.timeout, retries=asked.retries, rate=asked.rate,
        budget=asked.budget, batch_size=asked.batch_size,
    )  # fmt: skip
    if settings.recipe == "none":
        return BlackBoxModel(box, None)
    encoder = load_classifier(
        model.library, model.name, model.checkpoint, model.config, model.normalise,
        download=model.download, prefix=model.prefix,
    )  # fmt: skip
    shape = image_shape(configuration.data.name, configuration.data.image_size)
    made = settings.coordinator
    coordinator = Coordinator(
        encoder, channels=shape[0] if shape else 3, trigger=made.trigger, hidden=made.hidden, strength=made.strength,
        seed=seed,
    )  # fmt: skip
    return BlackBoxModel(box, coordinator)


def load_finetuned(configuration: Configuration, folder: Path | None) -> Trained:
    """The classifier to certify, in evaluation mode, LoRA merged. ``folder`` None: the off-the-shelf one."""
    classifier = adapted_classifier(configuration, seed=0)  # of weights that are replaced
    if folder is not None:
        read_record(folder)
        load_trainable_state(classifier, read_state(folder / WEIGHTS))
    whole = merge_lora(classifier) if isinstance(classifier, Classifier) else classifier
    return whole.eval().requires_grad_(False)


def model_identity(configuration: Configuration, folder: Path | None, *, whole: bool = False) -> str:
    """SHA-256 of all that makes ``load_finetuned``'s classifier what it is: constructor, base and trained weights."""
    content: dict[str, Any] = {"classifier": _named(configuration.classifier, "classifier", whole)}
    trained = {"adapter", "lora", configuration.finetuning.adapter}
    if configuration.kind == "black_box":
        behind = _named(configuration.black_box, "black_box", whole, include={"endpoint", "classes", "version"})
        content, trained = (content if folder is not None else {}) | {"black_box": behind}, {"coordinator"}
    if folder is not None:
        adapter = _named(configuration.finetuning, "finetuning", whole, include=trained)
        content |= {"finetuning": adapter, "weights": read_record(folder)["sha256"][WEIGHTS]}
    return identity(content)
