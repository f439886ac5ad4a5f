"""One trial: fine-tune epoch by epoch, count votes on validation images after each. What every worker runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cadis_ray.config import Configuration, FineTuning
from cadis_ray.data import DataSet, Split
from cadis_ray.data.augmentation import Augmentation
from cadis_ray.finetuning.checkpoint import adapted_classifier, load_finetuned, restore_checkpoint
from cadis_ray.finetuning.denoised import Denoised
from cadis_ray.finetuning.epoch import Batch, train_epoch
from cadis_ray.finetuning.evaluate import votes_on
from cadis_ray.finetuning.optimiser import make_optimiser
from cadis_ray.models.classifiers import Classifier

VOTING_BATCH = 512


@dataclass(frozen=True)
class Worker:
    """This process's place in the trial. ``wrap`` makes a model average its gradients over the workers; ``add`` sums
    a tensor over them in place."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    add: Callable[[Tensor], None] = lambda tensor: None


@dataclass(frozen=True)
class Epoch:
    """After ``epoch`` epochs (0: untrained): training means and votes (N, K + 1), both of all workers."""

    epoch: int
    metrics: dict[str, float]
    counts: np.ndarray
    classifier: Classifier
    optimiser: torch.optim.Optimizer | None


def trial_epochs(
    configuration: Configuration,
    data: DataSet,
    denoised_train: Callable[[int], Denoised],
    denoised_validation: np.ndarray,
    *,
    seed: int,
    worker: Worker | None = None,
    resume: Path | None = None,
) -> Iterator[Epoch]:
    """Yields after every epoch; a trial that trains nothing yields once, as epoch 0.

    ``denoised_train(epoch)`` (>= M, N, C, H, W) float16 in [-1, 1] holds that epoch's training images, augmented and
    denoised, of which the first M are used; ``denoised_validation`` (S, N, C, H, W) those to count on. ``resume``: a
    checkpoint to go on from; batches and weights are then those of an undisturbed run, because order and noise are
    addressed by (seed, epoch). Raises NonFiniteLoss.
    """
    worker = worker or Worker()
    settings = configuration.finetuning
    classifier = adapted_classifier(configuration, seed).to(worker.device)
    if settings.recipe == "none":
        yield Epoch(0, {}, _count(classifier, data, denoised_validation, worker), classifier, None)
        return
    optimiser = make_optimiser(classifier, settings)
    done = restore_checkpoint(resume, classifier, optimiser) if resume else 0
    frozen = _frozen(configuration).to(worker.device) if settings.update_selection == "frozen" else None
    model = worker.wrap(classifier)
    steps = -(-len(data.train.ids) // settings.batch_size)
    for epoch in range(done, settings.last_epoch):
        # Only drop path draws from it.
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch, worker.rank]).generate_state(1)[0]))
        metrics = train_epoch(
            model,
            optimiser,
            _batches(data.train, configuration.data.augmentation, denoised_train(epoch), settings, seed, epoch, worker),
            settings,
            epoch=epoch,
            first_step=epoch * steps,
            total_steps=settings.epochs * steps,
            bare=classifier,
            selection_classifier=frozen,
        )
        counts = _count(classifier, data, denoised_validation, worker)
        yield Epoch(epoch + 1, _of_all(metrics, worker), counts, classifier, optimiser)


def _batches(
    train: Split,
    augmentation: Augmentation,
    denoised: Denoised,
    settings: FineTuning,
    seed: int,
    epoch: int,
    worker: Worker,
) -> Iterator[list[Batch]]:
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(train.ids))
    for start in range(0, len(order), settings.batch_size):
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
    sums = torch.tensor([value * images for value in metrics.values()], dtype=torch.float64).to(worker.device)
    share = torch.tensor(images, dtype=torch.float64).to(worker.device)
    worker.add(sums)
    worker.add(share)
    return dict(zip(metrics, (sums / share).tolist(), strict=True)) | {"images": share.item()}


def _count(classifier: Classifier, data: DataSet, denoised: np.ndarray, worker: Worker) -> np.ndarray:
    mine = torch.arange(denoised.shape[1])[worker.rank :: worker.world]
    counts = torch.zeros(denoised.shape[1], data.num_classes + 1, dtype=torch.int64, device=worker.device)
    chosen = torch.from_numpy(denoised[:, mine.numpy()])
    counts[mine.to(worker.device)] = votes_on(classifier, chosen, batch_size=VOTING_BATCH, device=worker.device)
    worker.add(counts)
    return counts.cpu().numpy()


def _frozen(configuration: Configuration) -> nn.Module:
    return load_finetuned(configuration, None)
