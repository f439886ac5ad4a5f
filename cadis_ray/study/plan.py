"""What a study will do, stage by stage, counted before anything starts."""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from cadis_ray.data.collection import training_size
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.finetuning.passes import Passes, calls_a_vote, passes_an_image
from cadis_ray.smoothing.bounds import max_radius
from cadis_ray.smoothing.settings import schedule
from cadis_ray.storage.run_folder import CHECKPOINTS
from cadis_ray.study.study import Study, baselines, max_epochs, max_num_noises, searched_paths, trial_values, trial_with

FLOAT16_BYTES = 2
STATE_BYTES = 3 * 4  # a weight and AdamW's two moments, in a checkpoint


@dataclass(frozen=True)
class Stage:
    """Counts of one stage, and ``bytes`` of what it leaves in the run's folder.

    ``samples``: draws of noise for each of ``images``, shared by models that vote on the same ones. The counts of a
    trial with the mean of what is searched need not be whole.
    """

    name: str
    images: int
    samples: float
    denoiser_calls: float
    classifier_calls: Passes
    bytes: int = 0


class TrainingSet(NamedTuple):
    """How many, their (C, H, W), and in how many epochs, the first ones, the study's pool holds them denoised."""

    number: int
    shape: tuple[int, int, int]
    pooled: int


def training_set(study: Study) -> TrainingSet:
    """Count the images that are trained on; of a folder of images that takes a look at every file's name."""
    number, shape = training_size(study.base.data)
    limit = 0.0 if study.resources.pool == "off" else study.resources.pool_gb
    epoch_bytes, most = number * max_num_noises(study) * prod(shape) * FLOAT16_BYTES, max_epochs(study)
    return TrainingSet(number, shape, most if limit is None else min(most, int(limit * 1e9 // epoch_bytes)))


def plan(study: Study, images: TrainingSet, trained: int = 0) -> tuple[Stage, ...]:
    """Count a checked study's stages, fine-tuning and validation of its dearest trial, the others of all models.

    Early stopping makes it cheaper, repeated work dearer. Where the number of samples depends on votes, the largest is
    counted. The pool covers trials and baselines. ``trained``: numbers that a trial trains, known by its networks only.
    """
    base, wanted, trial = study.base, study.base.certification, dearest_trial(study)
    samples = images.pooled * max_num_noises(study)
    pooled = images.number * samples + base.validation.images * max(schedule(base.validation.samples))
    again, draws = study.finalists.images or base.data.validation, max(schedule(study.finalists.samples))
    models = min(study.finalists.count, study.trials) + (study.objective.clean_at_least is not None)
    certified = wanted.images * (wanted.n0 + wanted.n)
    voters = sum(map(calls_a_vote, [base, *baselines(study)]))
    kept = CHECKPOINTS * (study.trials + len(study.baselines))
    return (
        Stage("denoised pool", images.number, samples, pooled, Passes(), pooled * prod(images.shape) * FLOAT16_BYTES),
        training(trial, images),
        validation(trial),
        Stage("finalists", again, draws, again * draws, Passes(again * draws * models)),
        Stage("certification", wanted.images, wanted.n0 + wanted.n, certified, Passes(certified * voters)),
        Stage("checkpoints", 0, 0, 0, Passes(), kept * STATE_BYTES * trained),
    )


def training(chosen: Configuration, images: TrainingSet) -> Stage:
    """Count a trial's fine-tuning, which denoises for itself in the epochs that the pool does not hold."""
    epochs, noises = chosen.finetuning.last_epoch, chosen.finetuning.num_noises
    denoised = images.number * max(epochs - images.pooled, 0) * noises
    passes = passes_an_image(chosen).times(images.number * epochs)
    return Stage("fine-tuning", images.number, epochs * noises, denoised, passes)


def validation(chosen: Configuration) -> Stage:
    """Count the votes after each epoch of a trial, or once where nothing is trained, on images of the pool."""
    images, samples = chosen.validation.images, max(schedule(chosen.validation.samples))
    votes = images * samples * max(chosen.finetuning.last_epoch, 1)
    return Stage("validation", images, samples, 0, Passes(votes * calls_a_vote(chosen)))


def dearest_trial(study: Study) -> Configuration:
    """Make the trial that takes most: of FT-CADIS, than which no recipe takes more gradients."""
    epochs = min(max(trial_values(study, "finetuning.epochs")), max_epochs(study))
    settings = {"recipe": "ft_cadis", "adv_weight": 1.0, "epochs": epochs, "stop_after": None}
    if "frozen" in trial_values(study, "finetuning.update_selection"):
        settings["update_selection"] = "frozen"
    return trial_with(study, max, **settings)


def lines(study: Study) -> list[str]:
    """Tell the plan as plain text, a line for each stage."""
    images, trial, wanted = training_set(study), dearest_trial(study).finetuning, study.base.certification
    pool, tuning, judging, finalists, certifying, _ = plan(study, images)
    passes, models = tuning.classifier_calls, 1 + len(study.baselines)
    ceiling = float(max_radius(wanted.n, wanted.alpha, study.base.sigma))
    return [
        f"study {study.name}: {study.trials} trials over {', '.join(searched_paths(study))}; "
        f"{len(study.baselines)} baselines: {', '.join(study.baselines) or 'none'}",
        f"denoised pool, once: {pool.denoiser_calls:,} denoiser calls, {pool.bytes / 1e6:,.1f} MB in float16 "
        f"({pool.images:,} training images x {images.pooled} epochs x {max_num_noises(study)} noises, "
        f"{judging.images:,} validation images x {judging.samples:,} samples)",
        f"fine-tuning, a trial at most: {passes.forward:,} classifier passes forward, {passes.backward:,} backward "
        f"({tuning.images:,} images x {trial.epochs} epochs; M = {trial.num_noises} for the loss, "
        f"T x M with T = {trial.attack_steps} for the attack, M for the adversarial images)",
        f"validation, a trial at most: {judging.images * judging.samples * trial.epochs:,} classifier passes forward "
        f"({judging.images:,} images x {judging.samples:,} samples x {trial.epochs} epochs)",
        f"finalists, counted again: at most {finalists.classifier_calls.forward:,} denoiser and classifier passes "
        f"({finalists.images:,} validation images x {finalists.samples:,} samples x "
        f"{finalists.classifier_calls.forward // finalists.denoiser_calls} models)",
        f"certification: {certifying.denoiser_calls * models:,} denoiser and classifier passes "
        f"({certifying.images:,} test images x ({wanted.n0:,} + {wanted.n:,}) samples x {models} models, "
        "the winner and the baselines)",
        f"largest radius that n = {wanted.n:,} at alpha = {wanted.alpha} can certify: {ceiling:.4f}; "
        f"asked for: {', '.join(map(str, wanted.radii)) or 'none'}",
    ]
