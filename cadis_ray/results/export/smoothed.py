"""A smoothed classifier as a folder that depends on nothing else: weights as safetensors, all other as JSON."""

import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cadis_ray.data.sources import image_shape
from cadis_ray.errors import DataError, UsageError
from cadis_ray.finetuning.base_classifier import load_finetuned, model_identity
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.models.checkpoints import write_safetensors
from cadis_ray.models.classifiers.classifier import Classifier, load_classifier
from cadis_ray.models.classifiers.hub import DESCRIPTIONS, hub_folder
from cadis_ray.models.denoisers.diffusion import Denoiser, load_denoiser
from cadis_ray.results.export.hub import hub_state
from cadis_ray.smoothing.certifier import Certified, certify_images
from cadis_ray.storage.files import digest
from cadis_ray.storage.provenance import versions
from cadis_ray.storage.references import LOCAL

RECORD, CLASSIFIER, DENOISER = "smoothed.json", "classifier.safetensors", "denoiser.safetensors"
LAYOUT, PIPELINE = "classifier", "denoiser"  # folders: a hub's description of the classifier, a pipeline
FORMAT = 1


@dataclass(frozen=True)
class Smoothed:
    """A smoothed classifier: both networks and ``record``, the content of smoothed.json."""

    classifier: Classifier
    denoiser: Denoiser
    record: Mapping[str, Any]

    def certify(
        self,
        images: ArrayLike,
        ids: ArrayLike | None = None,
        *,
        n0: int,
        n: int,
        alpha: float,
        seed: int | None = None,
        batch_size: int = 256,
    ) -> Certified:
        """CERTIFY of ``images`` (N, H, W, C), uint8 or floating in [0, 1], on the device of the classifier.

        ``ids`` (N,) integers in [0, 2**32), all different, address the noise; None: 0 to N - 1. ``seed`` in [0, 2**32)
        is the noise's root, None: a fresh one from the system's randomness. The counts are those of a study for the
        same ids and seed, but for float32 rounding between machines. Radii are l2 on [0, 1] pixels.

        A certificate speaks of this classifier with these weights and this noise only. It is void if images were
        chosen by someone who knew (seed, ids), and of several answers if the best one is kept. Raises DataError for
        other images, ValueError for arguments out of their ranges.
        """
        device = next(self.denoiser.parameters()).device
        pixels = as_tensor(images, self.record["image_shape"], self.record["channels"]).to(device)
        addresses = torch.arange(len(pixels)) if ids is None else torch.as_tensor(np.asarray(ids, np.int64))
        bf16 = self.record["precision"] == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return certify_images(
                self.classifier, pixels, addresses, sigma=self.record["sigma"], n0=n0, n=n, alpha=alpha,
                seed=secrets.randbits(32) if seed is None else seed, num_classes=self.record["classes"],
                denoise=partial(self.denoiser.denoise, mode=self.record["noise"]), batch_size=batch_size,
            )  # fmt: skip


def as_tensor(images: ArrayLike, shape: list[int] | None, channels: int) -> Tensor:
    """Images (N, H, W, C), uint8 or floating in [0, 1], as float32 (N, C, H, W). ``shape``: (C, H, W) or None, any.

    Raises DataError for another type, rank or shape, or values outside [0, 1].
    """
    held = np.asarray(images)
    if held.dtype != np.uint8 and not np.issubdtype(held.dtype, np.floating):
        raise DataError(f"images are {held.dtype}; need uint8 in [0, 255] or floating in [0, 1]")
    wanted = None if shape is None else (shape[1], shape[2], shape[0])
    if held.ndim != 4 or not len(held) or held.shape[3] != channels or (wanted and held.shape[1:] != wanted):
        need = ", ".join(map(str, wanted or ("H", "W", channels)))
        raise DataError(f"images are {held.shape}; need (N, {need}) with N >= 1")
    if held.dtype != np.uint8 and not ((held >= 0) & (held <= 1)).all():  # false for NaN too
        raise DataError("floating images must be finite and in [0, 1]; give bytes as uint8")
    tensor = torch.from_numpy(np.ascontiguousarray(held.transpose(0, 3, 1, 2)).astype(np.float32))
    return tensor / 255 if held.dtype == np.uint8 else tensor


def save_smoothed(
    folder: Path, base: Configuration, configuration: Configuration, checkpoint: Path | None
) -> dict[str, Any]:
    """Write a smoothed classifier into ``folder``, which is new or empty; returns its record.

    ``base`` has sigma, denoiser and precision, ``configuration`` and ``checkpoint`` the classifier, as in
    ``certification.Request``. Adapters are merged. Raises UsageError where the folder holds something, DataError for
    weights that are refused.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty; give another folder")
    adapter = "none" if configuration.finetuning.recipe == "none" else configuration.finetuning.adapter
    if configuration.kind != "denoise_then_classify" or adapter in ("prompt", "series"):
        raise UsageError(
            f"{folder}: a base classifier of the kind {configuration.kind} with the adapter {adapter} cannot be saved "
            "so yet; need denoise_then_classify and lora, full or none"
        )
    folder.mkdir(parents=True, exist_ok=True)
    classifier = load_finetuned(configuration, checkpoint)
    assert isinstance(classifier, Classifier)
    denoiser = load_denoiser(base.denoiser.family, base.denoiser.checkpoint, base.denoiser.config)
    write_safetensors(folder / CLASSIFIER, hub_state(classifier))
    if base.denoiser.family == "diffusers":
        for part in ("unet", "scheduler"):
            unsafe = shutil.ignore_patterns("*.bin", "*.pt", "*.pkl", "*.py")
            shutil.copytree(Path(base.denoiser.checkpoint) / part, folder / PIPELINE / part, ignore=unsafe)
    else:
        write_safetensors(folder / DENOISER, denoiser.network.state_dict())
    model = configuration.classifier
    laid_out = hub_folder(f"hf-hub:{model.name}" if _bare_hub_name(configuration) else model.name, download=False)
    for name in DESCRIPTIONS if laid_out else ():
        if (file := laid_out / name).is_file():  # pyright: ignore[reportOptionalOperand]
            (folder / LAYOUT).mkdir(exist_ok=True)
            shutil.copyfile(file, folder / LAYOUT / name)
    shape = image_shape(base.data.name, base.data.image_size)
    with torch.inference_mode():
        classes = classifier(torch.zeros(1, denoiser.channels, *(shape or (0, *classifier.image_size))[1:])).shape[1]
    record = {
        "format": FORMAT,
        "classifier": model.model_dump(mode="json", include={"library", "name", "config", "normalise"})
        | ({"name": LOCAL + LAYOUT} if laid_out else {}),
        "denoiser": {"family": base.denoiser.family, "config": base.denoiser.config},
        "sigma": base.sigma,
        "timestep": denoiser.timestep(base.sigma),
        "sigma_actual": denoiser.sigma_actual(base.sigma),
        "noise": base.denoiser.noise,
        "precision": base.certification.precision,
        "image_shape": shape,
        "channels": denoiser.channels,
        "classes": classes,
        "model": model_identity(configuration, checkpoint),
        "sha256": {path.name: digest(path) for path in sorted(folder.iterdir())},
        "versions": versions(),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return record


def load_smoothed(folder: Path, device: str = "cpu") -> Smoothed:
    """The smoothed classifier of a folder, in evaluation mode. Raises DataError for a folder that is not whole."""
    try:
        record = json.loads((folder / RECORD).read_text())
        hashes = record["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a smoothed classifier ({error})") from error
    if record.get("format") != FORMAT:
        raise DataError(f"{folder / RECORD}: format {record.get('format')!r}; this version reads {FORMAT}")
    for name, expected in hashes.items():
        if not (folder / name).exists() or digest(folder / name) != expected:
            raise DataError(f"{folder / name}: missing or damaged: its SHA-256 is not the one in {RECORD}")
    made, denoising = record["classifier"], record["denoiser"]
    name = f"{LOCAL}{folder / LAYOUT}" if made["name"] == LOCAL + LAYOUT else made["name"]
    classifier = load_classifier(
        made["library"], name, str(folder / CLASSIFIER), made["config"], made["normalise"]
    ).requires_grad_(False)  # fmt: skip
    weights = folder / (PIPELINE if denoising["family"] == "diffusers" else DENOISER)
    denoiser = load_denoiser(denoising["family"], weights, denoising["config"])
    return Smoothed(classifier.to(device), denoiser.to(device), record)


def _bare_hub_name(configuration: Configuration) -> bool:
    """Whether the name is OWNER/NAME of transformers' hub."""
    model = configuration.classifier
    return model.library == "transformers" and "/" in model.name and ":" not in model.name
