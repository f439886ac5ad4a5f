"""Do the mask and the selection of FT-CADIS matter here? Retrains a study's base with each ablation and several seeds.

    python benchmarks/ablation.py [STUDY.yaml] [--seeds 3] [--set PATH=VALUE ...]

Prints a JSON line per setting: clean accuracy of the smoothed classifier (certified accuracy at radius 0) and ACR on
the study's test images at its certification settings, mean over seeds and standard deviation between them, and the
paired difference to the full objective with its 95% interval over images (radii averaged over seeds). All models are
counted under the same noise.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml

from cadis_ray.data import DataSet, Split, load
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.finetuning.trial import trial_epochs
from cadis_ray.models.adapters.lora import merge_lora
from cadis_ray.models.classifiers.classifier import Classifier
from cadis_ray.models.denoisers.diffusion import Denoiser, load_denoiser
from cadis_ray.smoothing.bounds import certify
from cadis_ray.smoothing.metrics import acr, certified_accuracy, paired_difference
from cadis_ray.smoothing.noise import Stream, gaussian
from cadis_ray.smoothing.sampling import sample_votes
from cadis_ray.study.load import load_study
from cadis_ray.study.study import Study, configuration

DIGITS = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"
ABLATIONS = {
    "full": {},
    "mask: none": {"finetuning.mask": "none"},
    "select: all": {"finetuning.select": "all"},
    "lambda = 0": {"finetuning.adv_weight": 0.0},
    "cross_entropy": {"finetuning.recipe": "denoised_ce"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", type=Path, default=DIGITS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="PATH=VALUE", dest="common")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = load_study(arguments.study)
    common = {path: yaml.safe_load(value) for path, _, value in (item.partition("=") for item in arguments.common)}
    base = configuration(study, common)
    data = load(base.data)
    denoiser = load_denoiser(base.denoiser.family, base.denoiser.checkpoint, base.denoiser.config)
    models = [
        trained(configuration(study, common | changes), data, denoiser, seed)
        for changes in ABLATIONS.values()
        for seed in range(arguments.seeds)
    ]
    radii, correct = (part.reshape(len(ABLATIONS), arguments.seeds, -1) for part in
                      certified(study, base, data, denoiser, models))  # fmt: skip
    credit = (radii * correct).mean(axis=1)
    for name, r, c, own in zip(ABLATIONS, radii, correct, credit, strict=True):
        scores = np.array([acr(*seed) for seed in zip(r, c, strict=True)])
        clean = np.array([certified_accuracy(*seed, 0.0) for seed in zip(r, c, strict=True)])
        difference = paired_difference(own, credit[0])
        record = {
            "setting": name, "seeds": arguments.seeds, "images": r.shape[1],
            f"acr@{base.certification.n}": scores.mean(), "acr_sd": scores.std(ddof=1),
            "clean": clean.mean(), "clean_sd": clean.std(ddof=1),
            "acr_difference": difference.mean, "interval": [difference.low, difference.high],
        }  # fmt: skip
        print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in record.items()}), flush=True)


def trained(chosen: Configuration, data: DataSet, denoiser: Denoiser, seed: int) -> Classifier:
    """The classifier after its last epoch, adapters merged."""
    settings = chosen.finetuning

    def pool(split: Split, stream: Stream, samples: list[int]) -> np.ndarray:
        draws = [torch.full_like(split.ids, sample) for sample in samples]
        noise = [gaussian(seed, stream, split.ids, draw, split.images.shape[1:]) for draw in draws]
        with torch.inference_mode():
            denoised = [denoiser.denoise(split.images, one, chosen.sigma).half() for one in noise]
        return torch.stack(denoised).numpy()

    def training(epoch: int) -> np.ndarray:
        return pool(data.train, Stream.TRAINING, [(epoch << 16) + index for index in range(settings.num_noises)])

    *_, last = trial_epochs(chosen, data, training, pool(data.validation, Stream.SEARCH, [0]), seed=seed)
    assert isinstance(last.classifier, Classifier)
    return merge_lora(last.classifier).eval()


def certified(
    study: Study, base: Configuration, data: DataSet, denoiser: Denoiser, models: list[Classifier]
) -> tuple[np.ndarray, np.ndarray]:
    """Radii and correctness (F, N) of every model on the test images."""
    settings = base.certification
    test = data.test.first(settings.images)
    votes = {
        stream: sample_votes(
            test.images, test.ids, partial(denoiser.denoise, sigma=base.sigma), models, num_classes=data.num_classes,
            seed=study.seed, stream=stream, start=0, size=size, batch_size=512,
        )
        for stream, size in ((Stream.SELECTION, settings.n0), (Stream.ESTIMATION, settings.n))
    }  # fmt: skip
    pairs = zip(votes[Stream.SELECTION].numpy(), votes[Stream.ESTIMATION].numpy(), strict=True)
    found = [certify(selection, estimation, settings.alpha, base.sigma) for selection, estimation in pairs]
    labels = test.labels.numpy()
    return np.array([r for _, r, _ in found]), np.array([p == labels for p, _, _ in found])


if __name__ == "__main__":
    main()
