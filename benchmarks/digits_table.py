"""A grid of fine-tunings of the digits and how each answers under noise: what ``benchmarks/study.py`` searches in.

    python benchmarks/digits_table.py FOLDER [--part 0/1] [--seed 0]

Trains each of the lambda x epsilon grid below on one denoised pool and counts, after every epoch, how often each of 800
images that nothing was trained on (validation and test) gets its label: 256 samples after the last epoch, 64 before,
the same noise for all. A file a configuration: k (epochs, images), n (epochs,), lambda, epsilon; those that are there
are not made again. ``--part I/N``: every N-th configuration from the I-th, for several processes at once. About 2
minutes a configuration on one core.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from cadis_ray.data import DataSet, Split, load
from cadis_ray.finetuning.trial import trial_epochs
from cadis_ray.models.classifiers.classifier import evaluation
from cadis_ray.models.denoisers.diffusion import load_denoiser
from cadis_ray.smoothing.noise import Stream, gaussian
from cadis_ray.storage.files import write_atomically
from cadis_ray.study.load import load_study
from cadis_ray.study.study import Study, configuration

DIGITS = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"
LAMBDAS = (1.0, 2.0, 4.0)
EPSILONS = (0.06, 0.125, 0.25, 0.5)
FIXED = {"finetuning.num_noises": 2, "finetuning.lora.r": 8}
SAMPLES, EARLY_SAMPLES = 256, 64
BATCH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", default="0/1", metavar="I/N")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    part, parts = map(int, arguments.part.split("/"))
    grid = [(weight, radius) for weight in LAMBDAS for radius in EPSILONS]
    make(load_study(DIGITS), grid[part::parts], arguments.folder, arguments.seed)


def make(study: Study, grid: list[tuple[float, float]], folder: Path, seed: int) -> None:
    """Train and count the configurations whose file is not there."""
    base = configuration(study, FIXED)
    data = load(base.data)
    held_out = [data.validation.first(base.validation.images), data.test.first(base.certification.images)]
    labels = torch.cat([split.labels for split in held_out])
    epochs, noises, model = base.finetuning.epochs, base.finetuning.num_noises, base.denoiser
    denoiser = load_denoiser(model.family, model.checkpoint, model.config)

    @torch.inference_mode()
    def denoised(split: Split, stream: Stream, samples: list[int]) -> np.ndarray:
        """(S, N, C, H, W), float16."""
        draws = []
        for sample in samples:
            noise = gaussian(seed, stream, split.ids, torch.full_like(split.ids, sample), split.images.shape[1:])
            draws.append(denoiser.denoise(split.images, noise, base.sigma).half())
        return torch.stack(draws).numpy()

    train = [
        denoised(data.train, Stream.TRAINING, [(epoch << 16) + index for index in range(noises)])
        for epoch in range(epochs)
    ]
    pool = np.concatenate([denoised(split, Stream.SEARCH, list(range(SAMPLES))) for split in held_out], axis=1)
    one = DataSet(data.name, data.num_classes, data.train, data.validation.first(1), data.test)
    for weight, radius in grid:
        path = folder / f"lambda-{weight:g}-epsilon-{radius:g}.npz"
        if path.exists():
            continue
        parameters = FIXED | {"finetuning.adv_weight": weight, "finetuning.attack_radius": radius}
        counted = []
        for epoch in trial_epochs(configuration(study, parameters), one, train.__getitem__, pool[:1, :1], seed=seed):
            samples = SAMPLES if epoch.epoch == epochs else EARLY_SAMPLES
            counted.append((right_votes(epoch.classifier, pool[:samples], labels), samples))
        k, n = map(np.array, zip(*counted, strict=True))
        with write_atomically(path) as file:
            np.savez_compressed(file, k=k, n=n, weight=weight, radius=radius)
        print(f"lambda {weight}, epsilon {radius}: {np.mean(k[-1] > SAMPLES / 2):.3f} right", flush=True)


@torch.inference_mode()
def right_votes(classifier: torch.nn.Module, pool: np.ndarray, labels: torch.Tensor) -> np.ndarray:
    """How many of the S samples of each image got its label (N,)."""
    samples, images = pool.shape[:2]
    flat, wanted = torch.from_numpy(pool).flatten(0, 1), labels.repeat(samples)
    with evaluation(classifier):
        right = [
            classifier(part.float()).argmax(1) == label
            for part, label in zip(flat.split(BATCH), wanted.split(BATCH), strict=True)
        ]
    return torch.cat(right).reshape(samples, images).sum(0).numpy()


if __name__ == "__main__":
    main()
