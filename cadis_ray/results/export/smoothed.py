"""A smoothed classifier as a folder that depends on nothing else: weights as safetensors, all other as JSON."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
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
from cadis_ray.smoothing.certifier import Certified, certify_images, predict_images
from cadis_ray.storage.files import digest
from cadis_ray.storage.provenance import versions
from cadis_ray.storage.references import LOCAL

RECORD, CLASSIFIER, DENOISER = "smoothed.json", "classifier.safetensors", "denoiser.safetensors"
LAYOUT, PIPELINE = "classifier", "denoiser"  # folders: a hub's description of the classifier, a pipeline
FORMAT = 1


@dataclass(frozen=True)
class SmoothedClassifier:
    """A smoothed classifier: both networks and ``record``, the content of smoothed.json.

    Its images are (N, H, W, C), uint8 or floating in [0, 1]; its radii are l2 on [0, 1] pixels.
    """

    classifier: Classifier
    denoiser: Denoiser
    record: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> "SmoothedClassifier":
        """Load a folder that ``python -m cadis_ray.export RUN --to safetensors`` wrote, in evaluation mode.

        ``device``: as PyTorch names it. Raises DataError for a folder that is not whole.
        """
        folder = Path(folder)
        record = _read_record(folder)
        made, denoising = record["classifier"], record["denoiser"]
        name = f"{LOCAL}{folder / LAYOUT}" if made["name"] == LOCAL + LAYOUT else made["name"]
        classifier = load_classifier(
            made["library"], name, str(folder / CLASSIFIER), made["config"], made["normalise"]
        ).requires_grad_(False)  # fmt: skip
        weights = folder / (PIPELINE if denoising["family"] == "diffusers" else DENOISER)
        denoiser = load_denoiser(denoising["family"], weights, denoising["config"])
        return cls(classifier.to(device), denoiser.to(device), record)

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
        """Certify images by CERTIFY (Cohen et al. 2019): classes with radii, -1 and 0.0 where it abstains.

        The counts are those of a study for the same ids and seed, but for float32 rounding between machines. A
        certificate speaks of this classifier with these weights and this noise only; ``smoothing.certifier``'s
        ``certify_images`` says what voids it.

        Args:
            images: (N, H, W, C), uint8 or floating in [0, 1].
            ids: (N,) integers in [0, 2**32), all different: addresses of the images' noise. None: 0 to N - 1.
            n0: Samples an image that select the class, >= 1.
            n: Other samples an image that bound its probability, >= 1.
            alpha: Probability with which one image's certificate may be false, in (0, 1).
            seed: Root of the noise, in [0, 2**32). None: a fresh one from the system's randomness.
            batch_size: Samples at a time, >= 1; changes no count.

        Raises:
            DataError: The images are of another type or shape, or not in [0, 1].
            ValueError: An argument is out of its range.
        """
        with self._sampled(images, ids, seed, batch_size) as (pixels, settings):
            return certify_images(self.classifier, pixels, n0=n0, n=n, alpha=alpha, **settings)

    def predict(
        self,
        images: ArrayLike,
        n: int,
        alpha: float,
        *,
        ids: ArrayLike | None = None,
        seed: int | None = None,
        batch_size: int = 256,
    ) -> NDArray[np.int64]:
        """Predict classes by PREDICT (Cohen et al. 2019): int64 (N,), -1 where it abstains. It gives no radius.

        Another class than the smoothed classifier's is returned with probability at most ``alpha`` an image.

        Args:
            images: As of ``certify``.
            n: Samples an image, >= 1; those that ``certify`` selects the class by, for the same ids and seed.
            alpha: In (0, 1).
            ids: As of ``certify``.
            seed: As of ``certify``.
            batch_size: As of ``certify``.

        Raises:
            DataError: The images are of another type or shape, or not in [0, 1].
            ValueError: An argument is out of its range.
        """
        with self._sampled(images, ids, seed, batch_size) as (pixels, settings):
            return predict_images(self.classifier, pixels, n=n, alpha=alpha, **settings)

    @contextmanager
    def _sampled(
        self, images: ArrayLike, ids: ArrayLike | None, seed: int | None, batch_size: int
    ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Give the images on the networks' device and how they are sampled, in the record's precision."""
        device = next(self.denoiser.parameters()).device
        pixels = as_tensor(images, self.record["image_shape"], self.record["channels"]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.record["precision"] == "bf16"):
            yield pixels, {
                "sigma": self.record["sigma"], "num_classes": self.record["classes"],
                "ids": None if ids is None else torch.as_tensor(np.asarray(ids, np.int64)), "seed": seed,
                "denoise": partial(self.denoiser.denoise, mode=self.record["noise"]), "batch_size": batch_size,
            }  # fmt: skip


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


def _read_record(folder: Path) -> dict[str, Any]:
    """The content of smoothed.json, once every file has the hash that stands in it. Raises DataError otherwise."""
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
    return record


def _bare_hub_name(configuration: Configuration) -> bool:
    """Whether the name is OWNER/NAME of transformers' hub."""
    model = configuration.classifier
    return model.library == "transformers" and "/" in model.name and ":" not in model.name
