"""What a study will do and what that costs, counted before anything starts."""

from dataclasses import dataclass
from math import prod

from cadis_ray.data.collection import training_size
from cadis_ray.smoothing.bounds import max_radius
from cadis_ray.smoothing.settings import schedule
from cadis_ray.study.study import Study, max_epochs, max_num_noises, searched_paths, trial_values

FLOAT16_BYTES = 2


@dataclass(frozen=True)
class Plan:
    """Counts of a study. A pass is of one image; passes of training and validation are of one trial, at most.

    Per image and epoch FT-CADIS passes M denoised images for the loss, M in each of T steps of the attack, and
    M adversarial images, forward and backward; fewer where an image's M predictions are not all right: it
    is not attacked then. ``update_selection: frozen`` adds M forward. Where the number of samples depends on votes, the
    largest is counted. ``pool_*`` cover trials and baselines; in epochs beyond ``pool_epochs`` each trial denoises for
    itself.
    ``radius_ceiling``: the largest radius, in [0, 1] pixels, that certification can give.
    """

    name: str
    searched: tuple[str, ...]
    trials: int
    baselines: tuple[str, ...]
    train_images: int
    image_shape: tuple[int, int, int]
    epochs: int
    num_noises: int
    attack_steps: int
    forward_passes: int
    backward_passes: int
    pool_epochs: int
    pool_noises: int
    pool_images: int
    pool_bytes: int
    validation_images: int
    validation_samples: int
    validation_passes: int
    certified_images: int
    certified_models: int
    n0: int
    n: int
    alpha: float
    certification_passes: int
    radii: tuple[float, ...]
    radius_ceiling: float
    finalists: int
    recounted_models: int
    recount_images: int
    recount_samples: int
    recount_passes: int


def plan(study: Study) -> Plan:
    """Count what a checked study takes; early stopping makes it cheaper, repeated work dearer."""
    base, certification = study.base, study.base.certification
    train_images, shape = training_size(base.data)
    epochs, num_noises, attack_steps = (
        max(trial_values(study, f"finetuning.{name}")) for name in ("epochs", "num_noises", "attack_steps")
    )
    epochs = min(epochs, max_epochs(study))
    backward_passes = train_images * epochs * num_noises * (attack_steps + 2)
    judged_apart = "frozen" in trial_values(study, "finetuning.update_selection")
    validation_samples = max(schedule(base.validation.samples))
    validation_draws = base.validation.images * validation_samples
    image_bytes = prod(shape) * FLOAT16_BYTES
    pool_epochs = _pool_epochs(study, train_images * max_num_noises(study) * image_bytes)
    pool_images = train_images * pool_epochs * max_num_noises(study) + validation_draws
    models = 1 + len(study.baselines)
    finalists = min(study.finalists.count, study.trials)
    recounted = finalists + (study.objective.clean_at_least is not None)
    recount_images = study.finalists.images or base.data.validation
    recount_samples = max(schedule(study.finalists.samples))
    return Plan(
        name=study.name,
        searched=searched_paths(study),
        trials=study.trials,
        baselines=tuple(study.baselines),
        train_images=train_images,
        image_shape=shape,
        epochs=epochs,
        num_noises=num_noises,
        attack_steps=attack_steps,
        forward_passes=backward_passes + judged_apart * train_images * epochs * num_noises,
        backward_passes=backward_passes,
        pool_epochs=pool_epochs,
        pool_noises=max_num_noises(study),
        pool_images=pool_images,
        pool_bytes=pool_images * image_bytes,
        validation_images=base.validation.images,
        validation_samples=validation_samples,
        validation_passes=validation_draws * epochs,
        certified_images=certification.images,
        certified_models=models,
        n0=certification.n0,
        n=certification.n,
        alpha=certification.alpha,
        certification_passes=certification.images * (certification.n0 + certification.n) * models,
        radii=certification.radii,
        radius_ceiling=float(max_radius(certification.n, certification.alpha, base.sigma)),
        finalists=finalists,
        recounted_models=recounted,
        recount_images=recount_images,
        recount_samples=recount_samples,
        recount_passes=recount_images * recount_samples * recounted,
    )


def _pool_epochs(study: Study, epoch_bytes: int) -> int:
    """The first epochs whose training images the study's pool holds."""
    limit = 0.0 if study.resources.pool == "off" else study.resources.pool_gb
    return max_epochs(study) if limit is None else min(max_epochs(study), int(limit * 1e9 // epoch_bytes))


def lines(plan: Plan) -> list[str]:
    """The plan as plain text, a line for each stage."""
    p = plan
    return [
        f"study {p.name}: {p.trials} trials over {', '.join(p.searched)}; "
        f"{len(p.baselines)} baselines: {', '.join(p.baselines) or 'none'}",
        f"denoised pool, once: {p.pool_images:,} denoiser calls, {p.pool_bytes / 1e6:,.1f} MB in float16 "
        f"({p.train_images:,} training images x {p.pool_epochs} epochs x {p.pool_noises} noises, "
        f"{p.validation_images:,} validation images x {p.validation_samples:,} samples)",
        f"fine-tuning, a trial at most: {p.forward_passes:,} classifier passes forward, "
        f"{p.backward_passes:,} backward ({p.train_images:,} images x {p.epochs} epochs; M = {p.num_noises} for "
        f"the loss, T x M with T = {p.attack_steps} for the attack, M for the adversarial images)",
        f"validation, a trial at most: {p.validation_passes:,} classifier passes forward "
        f"({p.validation_images:,} images x {p.validation_samples:,} samples x {p.epochs} epochs)",
        f"finalists, counted again: at most {p.recount_passes:,} denoiser and classifier passes "
        f"({p.recount_images:,} validation images x {p.recount_samples:,} samples x {p.recounted_models} models)",
        f"certification: {p.certification_passes:,} denoiser and classifier passes "
        f"({p.certified_images:,} test images x ({p.n0:,} + {p.n:,}) samples x {p.certified_models} models, "
        "the winner and the baselines)",
        f"largest radius that n = {p.n:,} at alpha = {p.alpha} can certify: {p.radius_ceiling:.4f}; "
        f"asked for: {', '.join(map(str, p.radii)) or 'none'}",
    ]
