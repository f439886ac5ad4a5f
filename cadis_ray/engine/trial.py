"""One trial on Ray: a Tune trial that drives a TorchTrainer, whose workers run the epochs of ``finetuning.trial``.

Three processes of every trial import this module, so that it imports what is slow only where it is used.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import ray.exceptions
import ray.train
import ray.tune
import ray.util
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup

from cadis_ray.config import Study, configuration
from cadis_ray.search_sections import Resources
from cadis_ray.storage.files import write_atomically
from cadis_ray.storage.packing import pack

if TYPE_CHECKING:
    from cadis_ray.data import Split
    from cadis_ray.finetuning.inputs import Denoised, Denoising
    from cadis_ray.finetuning.trial import Worker

# Without limits a trial whose workers find no place, or whose nodes are taken away again and again, never ends.
WORKER_FAILURES = 3
CONTROLLER_FAILURES = 30  # Ray tries once a minute
PREEMPTIONS = 30
CHECKPOINTS = 3  # the ledger may know the last epoch's or the one's before, and between them one may be interrupted
# Passes after the first of a step go through the bare module, so buffers must not be what they wait for.
DDP = {"forward_sync_buffers": False}
# A trial with workers only waits: they book their CPUs and GPUs in a placement group of their own.
DRIVER = {"CPU": 0.01}


class Pool(NamedTuple):
    """The denoised pool, float16 in [-1, 1]: ``train[epoch]`` (M, N, C, H, W), in Ray's object store, as M files, or
    None where each trial denoises for itself; and ``validation`` (S, N, C, H, W) in the object store."""

    train: list[ray.ObjectRef | list[Path] | None]
    validation: ray.ObjectRef


def run_trial(config: dict[str, Any], *, study: Study, pool: Pool, storage: str) -> None:
    """The Tune trial: start the workers, pass their reports on, fail if they could not go on.

    ``config``: number, session, parameters by dotted path, resume (checkpoint to go on from, or None). Raises only
    where a process of Ray's own died: then the search starts the trial again.
    """
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    class Epochs(TuneReportCallback):
        """Of an interrupted epoch, whose checkpoint Train itself goes on from, Tune hears nothing."""

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if metrics[0]:
                super().after_report(run_context, metrics, checkpoint)

    resources = study.resources
    least, most = resources.min_workers_per_trial, resources.workers_per_trial
    note = Path(storage) / f"trial-{config['number']:04d}.placement_group"
    _release(note)
    name = f"trial-{config['number']:04d}-{config['session']}"
    reports = Epochs()
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=config | {"study": study, "pool": pool, "folder": Path(storage) / name, "note": note},
        # 0 workers: Ray Train's local mode, in this process.
        scaling_config=ray.train.ScalingConfig(
            num_workers=most if least is None else (least, most),
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=worker_bundle(resources),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            callbacks=[reports],
            failure_config=ray.train.FailureConfig(
                max_failures=WORKER_FAILURES,
                controller_failure_limit=CONTROLLER_FAILURES,
                max_preemption_failures=PREEMPTIONS,
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=CHECKPOINTS),
        ),
    )
    try:
        failed = trainer.fit().return_value
    except Exception as error:  # whatever it is, it is this trial's end and not the study's
        if _died(error):
            raise
        failed = _reason(error)
    # A report still in the queue when this function returns can block Tune for ever (ray 2.60, session.py).
    while not reports._training_actor_item_queue.empty():
        time.sleep(0.2)
    time.sleep(1.0 if most else 0.0)
    if failed is not None:
        # Not an exception: of that Tune tells its callbacks no more than that there was one.
        ray.tune.report({"failed": failed, "epoch": 0, "acr": 0.0})


def _hold(note: Path) -> None:
    """Write down which placement group this trial's workers are in."""
    group = ray.util.get_current_placement_group()
    assert group is not None, "Ray Train starts its workers in one"
    with write_atomically(note) as file:
        file.write(group.id.hex().encode())


def _release(note: Path) -> None:
    """Free what the workers of an earlier attempt at the trial had booked: if the node of Train's controller dies, its
    placement group lives on with the job (ray 2.60; Train's own cleaner needs the dashboard, and one Ray a machine)."""
    if note.exists():
        identity = PlacementGroupID(bytes.fromhex(note.read_text()))
        ray.util.remove_placement_group(PlacementGroup(identity))
        note.unlink()


def worker_bundle(resources: Resources) -> dict[str, float]:
    """What one worker books."""
    return bundle(resources.cpus_per_worker, resources.gpus_per_worker)


def bundle(cpus: float, gpus: float) -> dict[str, float]:
    """CPUs and GPUs as Ray books them: no GPU is not a share of 0."""
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def _died(error: BaseException | None) -> bool:
    """Whether a process died, a worker or one of Ray's own, with its node perhaps; not something that they raised."""
    if isinstance(error, ray.exceptions.RayError):
        return not isinstance(error, ray.exceptions.RayTaskError)
    inner = [getattr(error, name, None) for name in ("controller_failure", "health_check_failure")]
    inner += getattr(error, "worker_failures", {}).values()
    return any(_died(one) for one in inner if one is not None)


def _reason(error: Exception) -> str:
    """The last line of what went wrong, in the first worker where something did."""
    causes = list(getattr(error, "worker_failures", {}).values()) or [error]
    lines = str(causes[0]).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def train_loop(config: dict[str, Any]) -> str | None:
    """Every worker's loop; returns why the trial cannot go on, or None at its end."""
    import torch

    from cadis_ray.data import load
    from cadis_ray.finetuning.batch import BEGINNING, NonFiniteLoss, Standing
    from cadis_ray.finetuning.checkpoint import save_checkpoint
    from cadis_ray.finetuning.inputs import make_denoising
    from cadis_ray.finetuning.trial import Epoch, Interruption, Worker, trial_epochs
    from cadis_ray.models.adapters.lora import trainable_parameters
    from cadis_ray.models.memory import keep_freed_memory
    from cadis_ray.summary import estimate_from

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


def training_images(pool: Pool, train: "Split", denoising: Callable[[], "Denoising"], epoch: int) -> "Denoised":
    """An epoch's denoised images of ``train``, from where the pool has them; ``denoising`` makes what it has not."""
    from cadis_ray.finetuning.inputs import Filed, Fresh

    held = pool.train[epoch]
    if held is None:
        return Fresh(denoising(), train, epoch)
    return Filed(held) if isinstance(held, list) else ray.get(held)


def _train_worker(resources: Resources) -> "Worker":
    """This worker's place among those of its trial; with several, models average gradients and counts are added up."""
    import ray.train.torch
    import torch.distributed

    from cadis_ray.finetuning.trial import Worker
    from cadis_ray.models.sharding import shard

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
