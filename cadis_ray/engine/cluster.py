"""Connecting to Ray, and leaving it in time."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from cadis_ray.errors import EnvironmentProblem
from cadis_ray.interface.signals import handlers, put_back
from cadis_ray.study.sections import Resources

SHUTDOWN_SECONDS = 8.0


@contextmanager
def cluster(address: str, resources: Resources) -> Iterator[None]:
    """A connection to the Ray cluster at ``address``; ``local`` starts one for this study alone and ends it afterwards.

    Signals are handled as before. Raises EnvironmentProblem where the cluster cannot be reached.
    """
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is said by us, once
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    before = handlers()
    try:
        if address == "local":
            ray.init(address="local", num_cpus=_local_cpus(resources), include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except Exception as error:  # Ray has no class of its own for what can go wrong here
        raise EnvironmentProblem(f"Ray at {address!r} cannot be reached: {error}") from error
    put_back(before)  # Ray installs handlers of its own
    try:
        yield
    finally:
        _shutdown()


def machines() -> list[dict[str, float]]:
    """What each machine of the connected cluster offers: CPUs, GPUs and their type, memory; no names."""
    nodes = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [{key: value for key, value in node.items() if not key.startswith("node:")} for node in nodes]


def _shutdown() -> None:
    # Bounded: what must not be lost is on disk already, and the processes of a local cluster die with this one.
    thread = threading.Thread(target=ray.shutdown, daemon=True)
    thread.start()
    thread.join(SHUTDOWN_SECONDS)


def _local_cpus(resources: Resources) -> int:
    """Logical CPUs for all trials' workers or all actors at once, and two for Ray's own tasks: it only books them."""
    workers = resources.concurrent_trials * max(resources.workers_per_trial, 1) * resources.cpus_per_worker
    actors = resources.actors * resources.cpus_per_actor
    return max(os.cpu_count() or 1, int(max(workers, actors) + 2))
