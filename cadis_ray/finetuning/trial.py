"""One trial: fine-tune epoch by epoch, count votes on validation images after each. What every worker runs."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cadis_ray.data import DataSet, Split
from cadis_ray.data.augmentation import Augmentation
from cadis_ray.finetuning.base_classifier import adapted_classifier, as_base, load_finetuned, view_of
from cadis_ray.finetuning.batch import BEGINNING, Batch, Standing
from cadis_ray.finetuning.checkpoint import restore_checkpoint
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.finetuning.cost import Cost
from cadis_ray.finetuning.epoch import train_epoch
from cadis_ray.finetuning.inputs import EPOCH_BITS, Denoised, Noisy
from cadis_ray.finetuning.optimiser import make_optimiser
from cadis_ray.finetuning.recipes.spsa import SpsaGc, spsa_epoch
from cadis_ray.finetuning.settings import NOISY, FineTuning
from cadis_ray.models.black_box import Trained
from cadis_ray.models.classifiers.classifier import evaluation
from cadis_ray.models.sharding import sharded
from cadis_ray.smoothing.estimate import next_samples
from cadis_ray.smoothing.noise import Stream
from cadis_ray.smoothing.racing import Rung, rung_at, rungs_of
from cadis_ray.smoothing.settings import schedule
from cadis_ray.smoothing.votes import count_votes

VOTING_BATCH = 512
NOTICE_STEPS = 10  # between two questions to all workers, which wait for each other to answer
Draws = np.ndarray | Noisy  # [samples, rows]: (S, R, C, H, W)


@dataclass(frozen=True)
class Worker:
    """This process's place in the trial. ``wrap`` makes a model average its gradients over the workers, or shards it in
    place; ``add`` sums a tensor over them in place; ``leaving``: whether one of their machines is about to go, with one
    answer for all."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    add: Callable[[Tensor], None] = lambda tensor: None
    leaving: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Epoch:
    """After ``epoch`` epochs (0: untrained): training means and votes (N, K + 1), both of all workers.

    ``metrics`` also has what the epoch cost with its votes: ``classifier_calls`` and ``queries`` as of ``Cost``, and
    ``denoiser_calls``, denoised images used, though the pool's are made once for all trials.
    """

    epoch: int
    metrics: dict[str, float]
    counts: np.ndarray
    classifier: Trained
    optimiser: torch.optim.Optimizer | None


@dataclass(frozen=True)
class Interruption:
    """Where a trial stands in the epoch after ``epoch``, all its workers together: to be kept before they go."""

    epoch: int
    standing: Standing
    classifier: Trained
    optimiser: torch.optim.Optimizer


def trial_epochs(
    configuration: Configuration,
    data: DataSet,
    denoised_train: Callable[[int], Denoised],
    denoised_validation: np.ndarray,
    *,
    seed: int,
    worker: Worker | None = None,
    resume: Path | None = None,
    racing: bool = False,
    keep: Callable[[Interruption], None] = lambda interruption: None,
) -> Iterator[Epoch]:
    """Yields after every epoch; a trial that trains nothing yields once, as epoch 0.

    ``denoised_train(epoch)`` (>= M, N, C, H, W) float16 in [-1, 1] holds that epoch's training images, augmented and
    denoised, of which the first M are used; ``denoised_validation`` (S, N, C, H, W) those to count on, as many samples
    of an image as ``validation.samples`` wants. Recipes and kinds of base classifier without a denoiser see x + noise
    instead, under the same noise. ``resume``: a checkpoint to go on from; batches and weights are then those of an
    undisturbed run, because order and noise are addressed by (seed, epoch). ``keep`` is called on every worker, once in
    an epoch, where one of them is leaving; black-box prompts, whose epochs are short, begin theirs again. ``racing``:
    early epochs are counted on fewer images, see ``smoothing.racing``; the others have no votes. Raises NonFiniteLoss.
    """
    worker = worker or Worker()
    settings = configuration.finetuning
    whole = Rung(denoised_validation.shape[1], schedule(configuration.validation.samples))
    budgets = rungs_of(whole.images, whole.schedule) if racing else (whole,)
    classifier = adapted_classifier(configuration, seed).to(worker.device)
    base, validation = as_base(configuration, classifier), _validation(configuration, data, denoised_validation, seed)
    cost = Cost(configuration, classifier)

    def spent(trained: float, votes: np.ndarray) -> dict[str, float]:
        own = cost.since_last()
        found = dict(zip(own, _summed(own.values(), worker), strict=True))
        return found | {"denoiser_calls": float(cost.denoised(trained, votes))}

    if settings.recipe == "none":
        votes = _count(base, data, validation, whole, seed, worker)
        yield Epoch(0, spent(0, votes), votes, classifier, None)
        return
    spsa = settings.recipe == "black_box_prompt"
    model = classifier if spsa else worker.wrap(classifier)
    with sharded(classifier):
        optimiser = _spsa(classifier, settings, seed) if spsa else make_optimiser(classifier, settings)
    done, standing = restore_checkpoint(resume, classifier, optimiser) if resume else (0, BEGINNING)
    frozen = _frozen(configuration).to(worker.device) if settings.update_selection == "frozen" else None
    training = _Training(configuration, data, seed, worker, classifier, model, optimiser, frozen, keep)
    for epoch in range(done, settings.last_epoch):
        drawn = _noisy_train(configuration, data, seed, epoch) if settings.recipe in NOISY else denoised_train(epoch)
        metrics = training.epoch(epoch, drawn, standing if epoch == done else BEGINNING)
        rung = rung_at(budgets, epoch + 1, settings.last_epoch)
        counts = _count(base, data, validation, rung, seed, worker)
        metrics = _of_all(metrics, worker)
        yield Epoch(epoch + 1, metrics | spent(metrics["images"], counts), counts, classifier, optimiser)


@dataclass(frozen=True)
class _Training:
    """What all epochs of a trial that trains share; ``model`` is the ``classifier``, wrapped for several workers."""

    configuration: Configuration
    data: DataSet
    seed: int
    worker: Worker
    classifier: Trained
    model: nn.Module
    optimiser: torch.optim.Optimizer
    frozen: nn.Module | None
    keep: Callable[[Interruption], None]

    def epoch(self, epoch: int, drawn: Denoised, began: Standing) -> dict[str, float]:
        """Take the steps of an epoch but for those that ``began`` has; returns this worker's means over its images."""
        settings, worker = self.configuration.finetuning, self.worker
        steps = -(-len(self.data.train.ids) // settings.batch_size)
        augmentation = self.configuration.data.augmentation
        batches = _batches(self.data.train, augmentation, drawn, settings, self.seed, epoch, worker, began.steps)
        if isinstance(self.optimiser, SpsaGc):
            return spsa_epoch(
                self.classifier, self.optimiser, batches, epoch=epoch, first_step=epoch * steps,
                average=lambda value: _summed([value], worker)[0] / worker.world,
            )  # fmt: skip
        return train_epoch(
            self.model, self.optimiser, batches, settings,
            epoch=epoch, first_step=epoch * steps, total_steps=settings.epochs * steps,
            bare=self.classifier, selection_classifier=self.frozen,
            done=began if worker.rank == 0 else Standing(began.steps),
            after_step=self._keeping(epoch, steps, bool(began.steps)),
        )  # fmt: skip

    def _keeping(self, epoch: int, steps: int, kept: bool) -> Callable[[Standing], None]:
        """Make what keeps the trial once in an epoch of so many ``steps``, where a worker is leaving."""

        def after_step(reached: Standing) -> None:
            nonlocal kept
            if reached.steps % NOTICE_STEPS or reached.steps == steps or kept or not self.worker.leaving():
                return
            kept = True
            standing = _standing_of_all(reached, self.worker)
            self.keep(Interruption(epoch, standing, self.classifier, self.optimiser))

        return after_step


def _noisy_train(configuration: Configuration, data: DataSet, seed: int, epoch: int) -> Noisy:
    def read(rows: Tensor) -> Tensor:
        return data.train.augmented(rows, epoch, seed, configuration.data.augmentation)

    settings = configuration.finetuning
    sigma = settings.noise_sigma or configuration.sigma
    return Noisy(read, data.train.ids, sigma, seed, Stream.TRAINING, epoch << EPOCH_BITS, settings.num_noises)


def _validation(configuration: Configuration, data: DataSet, denoised: np.ndarray, seed: int) -> Draws:
    if view_of(configuration) == "denoised":
        return denoised
    samples, images = denoised.shape[:2]
    split = data.validation.first(images)
    return Noisy(split.read, split.ids, configuration.sigma, seed, Stream.SEARCH, 0, samples)


def _spsa(classifier: nn.Module, settings: FineTuning, seed: int) -> SpsaGc:
    trained = (parameter for parameter in classifier.parameters() if parameter.requires_grad)
    gains = settings.coordinator
    return SpsaGc(trained, a=gains.a, c=gains.c, momentum=gains.momentum, averages=gains.averages, seed=seed)


def _standing_of_all(standing: Standing, worker: Worker) -> Standing:
    images, *sums = _summed((standing.images, *standing.sums), worker)
    return Standing(standing.steps, int(images), tuple(sums))


def _summed(values: Iterable[float], worker: Worker) -> list[float]:
    """Each number's sum over the workers."""
    total = torch.tensor([float(value) for value in values], dtype=torch.float64).to(worker.device)
    worker.add(total)
    return total.tolist()


def _batches(
    train: Split,
    augmentation: Augmentation,
    denoised: Denoised,
    settings: FineTuning,
    seed: int,
    epoch: int,
    worker: Worker,
    done: int,
) -> Iterator[list[Batch]]:
    """An epoch's batches but for the first ``done``."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(train.ids))
    for start in range(done * settings.batch_size, len(order), settings.batch_size):
        # Only drop path draws from it.
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch, start, worker.rank]).generate_state(1)[0]))
        rows = order[start : start + settings.batch_size]
        if len(rows) < worker.world:
            return  # a worker without an image has no gradient to average
        mine = rows[worker.rank :: worker.world]
        size = -(-len(mine) // settings.accumulation)
        yield [
            Batch(
                (2 * train.augmented(part, epoch, seed, augmentation) - 1).to(worker.device),
                torch.as_tensor(denoised[: settings.num_noises, part]).to(worker.device, torch.float32),
                train.labels[part].to(worker.device),
                scale=len(part) * worker.world / len(rows),
            )
            for part in (mine[first : first + size] for first in range(0, len(mine), size))
        ]


def _of_all(metrics: dict[str, float], worker: Worker) -> dict[str, float]:
    """Means over the images of all workers from those of this one; what is the same everywhere stays."""
    images = metrics["images"]
    total, *sums = _summed((images, *(value * images for value in metrics.values())), worker)
    return dict(zip(metrics, (value / total for value in sums), strict=True)) | {"images": total}


def _count(classifier: nn.Module, data: DataSet, denoised: Draws, rung: Rung, seed: int, worker: Worker) -> np.ndarray:
    """Votes (N, K + 1) of all workers; an image is counted by one of them, as it goes on by its own votes.

    A rung has the first of its images in a random order, the same for every trial.
    """
    labels = data.validation.labels[: denoised.shape[1]].numpy()
    counts = np.zeros((len(labels), data.num_classes + 1), np.int64)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(labels))[: rung.images]
    rows, done = np.sort(order)[worker.rank :: worker.world], 0
    for step in rung.schedule:
        k, n = counts[rows, labels[rows]], counts[rows].sum(axis=1)
        rows = rows[next_samples(k, n, rung.schedule) == step]
        if not len(rows):
            break
        chosen = torch.from_numpy(denoised[done:step, rows])
        counts[rows] += votes_on(classifier, chosen, batch_size=VOTING_BATCH, device=worker.device).cpu().numpy()
        done = step
    total = torch.from_numpy(counts).to(worker.device)
    worker.add(total)
    return total.cpu().numpy()


def _frozen(configuration: Configuration) -> nn.Module:
    return load_finetuned(configuration, None)


@torch.inference_mode()
def votes_on(classifier: nn.Module, denoised: Tensor, *, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Votes (N, K + 1), int64, of S denoised images of each of N images; the last column: votes for no class.

    ``denoised`` (S, N, C, H, W) in [-1, 1], of any float type and on any device; ``classifier`` is on
    ``device``, runs in float32 and evaluation mode, and is left in the mode it had. Counts of several calls
    add up.
    """
    samples, images = denoised.shape[:2]
    flat = denoised.flatten(0, 1)
    rows = torch.arange(images).repeat(samples).to(device)
    counts = []
    with evaluation(classifier):
        for chunk, chunk_rows in zip(flat.split(batch_size), rows.split(batch_size), strict=True):
            counts.append(count_votes(classifier(chunk.to(device, torch.float32)), chunk_rows, images))
    return torch.stack(counts).sum(0)
