"""The section of the study file that says how a trial fine-tunes."""

from typing import Annotated, Literal

from pydantic import Field

from cadis_ray.interface.section import Count, NonNegative, Positive, Section
from cadis_ray.models.settings import Coordinator, Lora, Prompt, Series

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
