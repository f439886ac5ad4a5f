"""What runs in every worker of a trial."""

import shutil
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import ray.tune
import ray.util
import torch
import torch.distributed

from cadis_ray.data import Split, load
from cadis_ray.engine.resources import Pool
from cadis_ray.finetuning.batch import BEGINNING, NonFiniteLoss, Standing
from cadis_ray.finetuning.checkpoint import save_checkpoint
from cadis_ray.finetuning.inputs import Denoised, Denoising, Filed, Fresh, make_denoising
from cadis_ray.finetuning.trial import Epoch, Interruption, Worker, trial_epochs
from cadis_ray.models.adapters.lora import trainable_parameters
from cadis_ray.models.memory import keep_freed_memory
from cadis_ray.models.sharding import shard
from cadis_ray.search.trials import estimate_from
from cadis_ray.storage.files import write_atomically
from cadis_ray.storage.packing import pack
from cadis_ray.storage.run_folder import CHECKPOINTS
from cadis_ray.study.sections import Resources
from cadis_ray.study.study import Study, configuration

# Passes after the first of a step go through the bare module, so buffers must not be what they wait for.
DDP = {"forward_sync_buffers": False}


def _hold(note: Path) -> None:
    """Write down which placement group this trial's workers are in."""
    group = ray.util.get_current_placement_group()
    assert group is not None, "Ray Train starts its workers in one"
    with write_atomically(note) as file:
        file.write(group.id.hex().encode())


def train(config: dict[str, Any]) -> str | None:
    """Run a worker's loop; returns why the trial cannot go on, or None at its end."""
    study: Study = config["study"]
    keep_freed_memory()
    torch.set_num_threads(study.resources.threads_per_process)
    chosen = configuration(study, config["parameters"])
    data = load(chosen.data)
    labels = data.validation.first(chosen.validation.images).labels.numpy()
    if study.resources.workers_per_trial:
        if ray.train.get_context().get_world_rank() == 0:
            _hold(config["note"])
        worker, send = _train_worker(study.resources), _report_from_worker
        latest = ray.train.get_checkpoint()
        resume = Path(latest.path) if latest else config["resume"]
    else:
        worker = Worker(device="cuda" if study.resources.gpus_per_worker else "cpu")
        send, resume = partial(_report_from_trial, config["folder"]), config["resume"]

    def hand_over(report: dict[str, Any], name: str, reached: Epoch | Interruption, standing: Standing) -> None:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, writes = None, worker.rank == 0
            if reached.optimiser is not None and (writes or study.resources.data_parallel == "fsdp"):
                save_checkpoint(
                    Path(folder) if writes else None, reached.classifier, reached.optimiser, chosen, seed=study.seed,
                    epoch=reached.epoch, standing=standing,
                )  # fmt: skip
                checkpoint = ray.train.Checkpoint.from_directory(folder) if writes else None
            send(report, checkpoint, name)

    def keep(reached: Interruption) -> None:
        hand_over({}, f"epoch-{reached.epoch:04d}-{reached.standing.steps}", reached, reached.standing)

    pool: Pool = config["pool"]
    denoising = cache(partial(make_denoising, chosen, study.seed, worker.device))  # loaded where an epoch needs it
    epochs = trial_epochs(
        chosen, data, partial(training_images, pool, data.train, denoising), ray.get(pool.validation),
        seed=study.seed, worker=worker, resume=Path(resume) if resume else None,
        racing=study.scheduler.name == "racing", keep=keep,
    )  # fmt: skip
    try:
        started = time.monotonic()
        for epoch in epochs:
            metrics = epoch.metrics | {"seconds": time.monotonic() - started}
            found = estimate_from(chosen, labels, epoch.counts)
            report = {
                "epoch": epoch.epoch, "acr": found.acr, "acr_se": found.se, "clean": found.clean,
                "metrics": metrics, "counts": pack(epoch.counts),
                "trainable_parameters": trainable_parameters(epoch.classifier),
            }  # fmt: skip
            hand_over(report, f"epoch-{epoch.epoch:04d}", epoch, BEGINNING)
            started = time.monotonic()
    except NonFiniteLoss as problem:
        return str(problem)
    return None


def training_images(pool: Pool, train: Split, denoising: Callable[[], Denoising], epoch: int) -> Denoised:
    """An epoch's denoised images of ``train``, from where the pool has them; ``denoising`` makes what it has not."""
    held = pool.train[epoch]
    if held is None:
        return Fresh(denoising(), train, epoch)
    return Filed(held) if isinstance(held, list) else ray.get(held)


def _train_worker(resources: Resources) -> Worker:
    """This worker's place among those of its trial; with several, models average gradients and counts are added up."""
    context, device = ray.train.get_context(), str(ray.train.torch.get_device())
    rank, world = context.get_world_rank(), context.get_world_size()
    if world == 1:
        return Worker(device=device, leaving=_leaving)

    def add(counts: torch.Tensor) -> None:
        torch.distributed.all_reduce(counts)

    average = partial(ray.train.torch.prepare_model, parallel_strategy_kwargs=DDP)
    return Worker(rank, world, device, shard if resources.data_parallel == "fsdp" else average, add, _leaving)


def _leaving() -> bool:
    """Whether a node of one of the workers is being drained, as it is when a spot machine has been told to end."""
    return ray.train.get_preemption_info() is not None


def _report_from_worker(report: dict[str, Any], checkpoint: ray.train.Checkpoint | None, name: str) -> None:
    ray.train.report(report, checkpoint, checkpoint_dir_name=name)


def _report_from_trial(
    folder: Path, report: dict[str, Any], checkpoint: ray.train.Checkpoint | None, name: str
) -> None:
    """What Ray Train's controller does for its workers: local mode has none. Keeps the checkpoint, then tells Tune."""
    if checkpoint is not None:
        kept = checkpoint.to_directory(str(folder / f".{name}.tmp"))
        report = report | {"checkpoint_path": str(Path(kept).rename(folder / name))}
        for old in sorted(folder.glob("epoch-*"))[:-CHECKPOINTS]:
            shutil.rmtree(old)
    ray.tune.report(report)
