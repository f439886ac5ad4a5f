"""Memory and time of a step of full fine-tuning, with the optimiser's state whole (ddp) or in shares (fsdp).

    python benchmarks/sharding.py [--workers 2] [--steps 3] [--classifier vit_base_patch16_224]

Prints JSON lines: the peak of a worker's resident memory, less what it had before it made the optimiser, and seconds a
step. The classifier has random weights; a worker has 8 images of 32 pixels with M = 2 and T = 1. gloo, on the CPU.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from cadis_ray.engine.worker import DDP
from cadis_ray.finetuning.batch import Batch
from cadis_ray.finetuning.epoch import train_epoch
from cadis_ray.finetuning.optimiser import make_optimiser
from cadis_ray.finetuning.settings import FineTuning
from cadis_ray.models.classifiers.classifier import load_classifier
from cadis_ray.models.sharding import shard, sharded

SETTINGS = FineTuning(adapter="full", num_noises=2, attack_steps=1, attack_radius=0.25, mask="none", epochs=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--classifier", default="vit_base_patch16_224")
    arguments = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(
        2**17
    )  # workers' freed tensors go back to the system: the peak is in use
    for kind in ("ddp", "fsdp"):
        with tempfile.TemporaryDirectory() as folder:
            asked = (kind, arguments.workers, arguments.steps, arguments.classifier, Path(folder))
            spawn(worker, asked, nprocs=arguments.workers)
            print((Path(folder) / "found").read_text(), flush=True)


def worker(rank: int, kind: str, workers: int, steps: int, name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)
    classifier = load_classifier("timm", name, None, {"num_classes": 10, "img_size": 32}, "half")
    weights = sum(parameter.numel() for parameter in classifier.parameters())
    before = peak()
    wrap = shard if kind == "fsdp" else partial(DistributedDataParallel, **DDP)
    model = wrap(classifier)
    with sharded(classifier):
        optimiser = make_optimiser(classifier, SETTINGS)
    generator = torch.Generator().manual_seed(rank)
    clean = torch.rand((8, 3, 32, 32), generator=generator)
    batch = Batch(clean, torch.stack([clean, clean.flip(-1)]), torch.arange(8))
    taken: list[float] = []

    def batches():
        for _ in range(steps + 1):
            taken.append(time.perf_counter())
            yield [batch]

    train_epoch(model, optimiser, batches(), SETTINGS, epoch=0, first_step=0, total_steps=steps + 1, bare=classifier)
    if rank == 0:
        found = {
            "data_parallel": kind, "workers": workers, "parameters_millions": round(weights / 1e6, 1),
            "gib_more_than_weights": round(peak() - before, 2),
            "seconds_per_step": round((time.perf_counter() - taken[1]) / steps, 2),
        }  # fmt: skip
        (folder / "found").write_text(json.dumps(found))
    dist.destroy_process_group()


def peak() -> float:
    """GiB, of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
