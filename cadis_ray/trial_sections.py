"""Sections of the study file that say what a trial does: fine-tuning, what it counts, and what is certified."""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from cadis_ray.data.settings import Data
from cadis_ray.interface.section import A_LIST, Count, NonNegative, Positive, Section, got
from cadis_ray.models.settings import (
    BaseClassifier,
    BlackBox,
    Classifier,
    Coordinator,
    Denoiser,
    Kind,
    Lora,
    Prompt,
    Series,
)

NOISY = ("gaussian", "smoothadv", "peft_smoothing", "black_box_prompt")  # recipes that train on x + noise


class FineTuning(Section):
    """How a trial fine-tunes. The ablation switches carry the names of the papers' tables.

    ``recipe`` ft_cadis and denoised_ce train on denoised images; gaussian (Cohen et al. 2019), smoothadv (Salman et
    al. 2019), peft_smoothing and black_box_prompt (PEFTSmoothing) on x + noise, whose std is ``noise_sigma`` (None:
    sigma). ``adapter`` says what trains, with the head, whatever the recipe, but for black_box_prompt.
    ``attack_radius`` is l2 on the [-1, 1] scale for every recipe, twice a radius on [0, 1] pixels; smoothadv reaches
    it after ``attack_warmup_epochs``.
    ``batch_size``: of a step, over all workers and ``accumulation`` parts. ``stop_after``: epochs to take of a
    schedule of ``epochs``, None: all.
    """

    recipe: Literal[
        "ft_cadis", "denoised_ce", "none", "gaussian", "smoothadv", "peft_smoothing", "black_box_prompt"
    ] = "ft_cadis"
    adapter: Literal["lora", "full", "prompt", "series"] = "lora"
    lora: Lora = Lora()
    prompt: Prompt = Prompt()
    series: Series = Series()
    coordinator: Coordinator = Coordinator()
    adv_weight: NonNegative = 1.0
    attack_radius: NonNegative = 0.25
    attack_steps: Annotated[int, Field(ge=0)] = 4
    num_noises: Count = 4
    renormalise: bool = True
    warm_start: bool = True
    detach_target: bool = False
    select: Literal["non_hallucinated", "all", "confidence"] = "non_hallucinated"
    confidence: Annotated[float, Field(ge=0, le=1)] = 0.5
    update_selection: Literal["every_step", "frozen"] = "every_step"
    mask: Literal["all_correct", "none"] = "all_correct"
    target: Literal["consistency", "label"] = "consistency"
    reduction: Literal["max", "mean"] = "max"
    epochs: Count = 10
    stop_after: Count | None = None
    batch_size: Count = 128
    accumulation: Count = 1
    base_lr: Positive = 5e-4
    min_lr: NonNegative = 1e-6
    warmup_epochs: NonNegative = 1.0
    weight_decay: NonNegative = 0.04
    weight_decay_end: NonNegative = 0.4
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65
    clip: Literal["per_tensor", "global"] = "per_tensor"
    clip_norm: Positive = 1.0
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["float32", "bf16"] = "float32"
    attack_radius_doubles_after: Count | None = None
    attack_warmup_epochs: Annotated[int, Field(ge=0)] = 10
    noise_sigma: Positive | None = None

    @property
    def last_epoch(self) -> int:
        """How many epochs a trial takes; 0 where nothing is trained."""
        return 0 if self.recipe == "none" else min(self.epochs, self.stop_after or self.epochs)


def _samples(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    allowed = "a number of samples, or a growing list of them such as [32, 128, 512]"
    try:
        found = validate(value)
    except ValidationError:  # else one message for each kind
        raise ValueError(f"got {got(value)}; need {allowed}") from None
    if any(later <= earlier for earlier, later in pairwise(schedule(found))):
        raise ValueError(f"got {value}; need {allowed}")
    return found


Samples = Annotated[Count | Annotated[tuple[Count, ...], A_LIST, Field(min_length=1)], WrapValidator(_samples)]


def schedule(samples: int | tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of samples an image can have, the first for all; see ``smoothing.estimate.next_samples``."""
    return samples if isinstance(samples, tuple) else (samples,)


class Validation(Section):
    """What a trial counts after each epoch: label-aware, few samples, many images. Never a certificate.

    ``samples``: of every image, or a growing list: an image goes on to the next number while at most two of its
    samples missed the label.
    """

    images: Count = 400
    samples: Samples = 64


class Finalists(Section):
    """After the search its best ``count`` trials are counted again, and the winner is chosen by that count alone.

    ``images``: of the validation images, None: all of them. ``samples`` as of validation, with noise of their own.
    """

    count: Annotated[int, Field(ge=1, le=3)] = 3
    images: Count | None = None
    samples: Samples = (32, 128, 512)


class Certification(Section):
    """Certificates on test images with fresh noise.

    ``mode`` protocol: CERTIFY of Cohen et al. 2019, n samples an image. sequential: at most n, fewer where ``radii``
    are settled before. estimate: a few samples an image and no certificate, not for a study. ``precision`` bf16: of
    the networks' insides; x_start, logits and argmax stay float32. It is another classifier, and has votes of its own.
    """

    mode: Literal["protocol", "sequential", "estimate"] = "protocol"
    precision: Literal["float32", "bf16"] = "float32"
    images: Count = 200
    n0: Count = 100
    n: Annotated[int, Field(ge=1, le=2**53)] = 10_000  # float64 tells every n up to there
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.001
    radii: Annotated[tuple[NonNegative, ...], A_LIST] = (0.0, 0.25, 0.5, 0.75)


class Configuration(Section):
    """Everything one trial needs."""

    data: Data
    sigma: Positive
    denoiser: Denoiser
    classifier: Classifier
    base_classifier: BaseClassifier = BaseClassifier()
    black_box: BlackBox = BlackBox()
    finetuning: FineTuning = FineTuning()
    validation: Validation = Validation()
    certification: Certification = Certification()

    @property
    def kind(self) -> Kind:
        """The kind of base classifier, which ``base_classifier.kind`` may leave to the recipe."""
        if self.finetuning.recipe == "black_box_prompt":
            return "black_box"
        noisy = self.finetuning.recipe in NOISY
        return self.base_classifier.kind or ("classify" if noisy else "denoise_then_classify")
