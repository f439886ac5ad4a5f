"""What a study has to say: plain data, from which table, report, MLflow and result.json are made."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from cadis_ray.certification.request import Request, certified_images
from cadis_ray.errors import IntegrityError
from cadis_ray.finetuning.base_classifier import load_base, load_view, view_of
from cadis_ray.models.black_box import BlackBoxModel
from cadis_ray.smoothing.noise import Stream, gaussian
from cadis_ray.storage.files import write_whole
from cadis_ray.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Examples:
    """What the base classifier of the model ``name`` was shown of some test images, one row an image.

    ``clean``, ``noisy`` and ``seen``, which is the denoised image where the model has a denoiser: (N, H, W, C) uint8,
    clamped. ``confidence``: its softmax for ``predict``, on ``seen``. The surest right answers, then the surest wrong.
    """

    name: str
    idx: np.ndarray
    label: np.ndarray
    predict: np.ndarray
    confidence: np.ndarray
    clean: np.ndarray
    noisy: np.ndarray
    seen: np.ndarray


def write_examples(run_dir: Path, examples: Examples) -> None:
    """Write them into the folder of a run, whole or not at all."""
    held: dict[str, Any] = vars(examples)
    file = io.BytesIO()
    np.savez_compressed(file, **held)
    write_whole(RunFolder(run_dir).examples, file.getvalue())


def read_examples(run_dir: Path) -> Examples | None:
    """What ``write_examples`` wrote; None where nothing was. Raises IntegrityError for a damaged file."""
    try:
        with RunFolder(run_dir).examples.open("rb") as file, np.load(file, allow_pickle=False) as held:
            return Examples(**{key: held[key] for key in held.files if key != "name"}, name=str(held["name"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise IntegrityError(
            f"{RunFolder(run_dir).examples}: damaged ({error}); remove it and resume the run"
        ) from error


LOOKED_AT, SHOWN = 64, 8
STREAM = Stream.AUDIT  # no certificate counts it


@torch.inference_mode()
def make_examples(request: Request, name: str, device: str) -> Examples | None:
    """The base classifier ``name`` on one noisy copy each of the first certified images, those with the surest answers.

    At most half of them are those taken for a wrong class. None for a black box: its queries cost.
    """
    configuration, checkpoint = request.models[name].configuration, request.models[name].checkpoint
    classifier = load_base(configuration, checkpoint).to(device)
    if isinstance(classifier, BlackBoxModel):
        return None
    test, _ = certified_images(request.base)
    test = test.first(min(LOOKED_AT, len(test.ids)))
    images = test.read(torch.arange(len(test.ids))).to(device)
    noise = gaussian(request.seed, STREAM, test.ids, torch.zeros_like(test.ids), images.shape[1:], device)
    view = load_view(request.base, view_of(configuration), device)(images, noise)
    confidence, predict = classifier(view).float().softmax(dim=1).cpu().max(dim=1)
    rows = _surest(confidence, predict == test.labels)
    shown = {"clean": images, "noisy": images + request.base.sigma * noise, "seen": (view + 1) / 2}
    return Examples(
        name=name,
        idx=test.ids[rows].numpy(),
        label=test.labels[rows].numpy(),
        predict=predict[rows].numpy(),
        confidence=confidence[rows].numpy(),
        **{key: _bytes(pixels[rows]) for key, pixels in shown.items()},
    )


def _surest(confidence: Tensor, correct: Tensor) -> Tensor:
    """At most SHOWN rows: correct ones, then wrong ones, each the surest first."""
    order = confidence.argsort(descending=True, stable=True)
    right, wrong = order[correct[order]], order[~correct[order]]
    half = SHOWN // 2
    wrong = wrong[: max(half, SHOWN - len(right))]
    return torch.cat([right[: SHOWN - len(wrong)], wrong])


def _bytes(pixels: Tensor) -> np.ndarray:
    """(N, C, H, W) on [0, 1], clamped, as (N, H, W, C) uint8."""
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
