"""One trial on Ray: a Tune trial that drives a TorchTrainer, whose workers run the epochs of ``finetuning.trial``.

Three processes of every trial import this module, so that it imports what is slow only where it is used.
"""

import time
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.tune
import ray.util
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup

from cadis_ray.engine.resources import Pool, worker_bundle
from cadis_ray.storage.run_folder import CHECKPOINTS
from cadis_ray.study.study import Study

# Without limits a trial whose workers find no place, or whose nodes are taken away again and again, never ends.
WORKER_FAILURES = 3
CONTROLLER_FAILURES = 30  # Ray tries once a minute
PREEMPTIONS = 30


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


def train_loop(config: dict[str, Any]) -> str | None:
    """Run a worker's loop; returns why the trial cannot go on, or None at its end."""
    from cadis_ray.engine.worker import train  # torch takes 3 s, and only one of a trial's processes needs it

    return train(config)


def _release(note: Path) -> None:
    """Free what the workers of an earlier attempt at the trial had booked: if the node of Train's controller dies, its
    placement group lives on with the job (ray 2.60; Train's own cleaner needs the dashboard, and one Ray a machine)."""
    if note.exists():
        identity = PlacementGroupID(bytes.fromhex(note.read_text()))
        ray.util.remove_placement_group(PlacementGroup(identity))
        note.unlink()


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
