"""What trials and their workers book of the cluster, and where they find the denoised pool."""

from pathlib import Path
from typing import NamedTuple

import ray.util

from cadis_ray.study.sections import Resources

# A trial with workers only waits: they book their CPUs and GPUs in a placement group of their own.
DRIVER = {"CPU": 0.01}


class Pool(NamedTuple):
    """The denoised pool, float16 in [-1, 1]: ``train[epoch]`` (M, N, C, H, W), in Ray's object store, as M files, or
    None where each trial denoises for itself; and ``validation`` (S, N, C, H, W) in the object store."""

    train: list[ray.ObjectRef | list[Path] | None]
    validation: ray.ObjectRef


def worker_bundle(resources: Resources) -> dict[str, float]:
    """What one worker books."""
    return bundle(resources.cpus_per_worker, resources.gpus_per_worker)


def bundle(cpus: float, gpus: float) -> dict[str, float]:
    """CPUs and GPUs as Ray books them: no GPU is not a share of 0."""
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
