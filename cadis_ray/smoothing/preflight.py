"""What must hold before votes are counted: raw images, and a classifier that answers for each of them alone."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cadis_ray.errors import DataError
from cadis_ray.smoothing.noise import Stream, gaussian
from cadis_ray.smoothing.sampling import SMALLEST, Classify, Denoise

SAMPLES = 8  # noisy samples whose answers are compared
TOLERANCE = 0.05  # of a logit's spread; bf16 and another batch's kernels stay below, batch statistics do not
JUDGED = 30  # images from which on labels tell a dead model from bad luck


def check_images(images: Tensor, ids: Tensor) -> None:
    """DataError, naming the image, unless every value of ``images`` (N, C, H, W) is finite and in [0, 1].

    ``ids`` (N,) address their noise: ValueError if two are equal, since those images would share it.
    """
    if images.ndim != 4 or not images.is_floating_point() or not len(images) or len(ids) != len(images):
        raise ValueError(f"images must be (N, C, H, W), floating, and ids (N,), got {tuple(images.shape)}, {len(ids)}")
    if len(ids.unique()) < len(ids):
        raise ValueError("ids must differ: they address the images' noise")
    flat = images.flatten(1)
    finite = flat.isfinite()
    if not finite.all():
        row = int((~finite).any(dim=1).int().argmax())
        raise DataError(f"image {int(ids[row])}: {int((~finite[row]).sum())} values are not finite; need [0, 1]")
    low, high = flat.min(dim=1).values, flat.max(dim=1).values
    if (wrong := (low < 0) | (high > 1)).any():
        row = int(wrong.int().argmax())
        raise DataError(
            f"image {int(ids[row])}: values from {float(low[row]):.4g} to {float(high[row]):.4g}: looks normalised "
            "already; noise is added to raw images in [0, 1]"
        )


@torch.inference_mode()
def preflight(
    classify: Classify,
    images: Tensor,
    denoise: Denoise,
    *,
    num_classes: int | None,
    labels: Tensor | None = None,
    sigma: float | None = None,
) -> int:
    """Refuse a base classifier that no certificate can hold for, or that is dead. DataError says why.

    Returns K, the number of its classes, which is ``num_classes`` unless that is None.

    ``images`` (N, C, H, W) in [0, 1]; ``classify`` and ``denoise`` as for ``sampling.sample_votes``; noise comes from
    the audit's stream. Refused are: modules in training mode; logits that are not (N, num_classes), not finite, or on
    clean images equal for all classes; logits that do not change with the noise; logits of one sample that change
    with the others of its batch, or from call to call; with ``sigma`` a ``denoise`` whose answer is not a function of
    images + sigma * noise alone, such as a prompt for x added before the noise; and, with at least 30 ``labels`` (N,)
    of two classes or more, a mean recall on clean images no better than a constant answer's.

    What passes is not proved sound: a dependence between samples that none of the few batches shows voids the
    guarantee all the same.
    """
    _check_modes(classify, denoise)
    clean = torch.cat([classify(denoise(part, torch.zeros_like(part))).float() for part in images.split(SMALLEST)])
    _check_clean(clean, num_classes)
    num_classes = clean.shape[1]
    _check_alone(classify, images, denoise, clean)
    if sigma is not None:
        _check_noise_first(images, denoise, sigma)
    if labels is not None:
        _check_labels(clean.argmax(dim=1), labels.to(clean.device), num_classes)
    return num_classes


def _check_modes(*functions: Callable[..., Any]) -> None:
    for module in _modules(*functions):
        for name, part in module.named_modules():
            if part.training:
                where = f"{type(module).__name__}.{name}" if name else type(module).__name__
                raise DataError(f"{where} is in training mode: its answers depend on the batch or on chance; "
                                "call .eval() on the whole model")  # fmt: skip


def _modules(*functions: Callable[..., Any]) -> Iterator[nn.Module]:
    for function in functions:
        function = getattr(function, "func", function)  # of a functools.partial
        function = getattr(function, "__self__", function)  # of a method
        if isinstance(function, nn.Module):
            yield function


def _check_clean(clean: Tensor, num_classes: int | None) -> None:
    if clean.ndim != 2 or clean.shape[1] < 2:
        raise DataError(f"the classifier's logits are {tuple(clean.shape[1:])} an image, need (K,) with K >= 2 classes")
    if num_classes is not None and clean.shape[1] != num_classes:
        raise DataError(f"the classifier's logits are {tuple(clean.shape[1:])} an image, the data has {num_classes} "
                        "classes")  # fmt: skip
    if dead := int((~clean.isfinite().all(dim=1)).sum()):
        raise DataError(f"the classifier's logits are not finite on {dead} of {len(clean)} clean images")
    if (clean == clean[:, :1]).all():
        raise DataError("the classifier's logits are equal for all classes on every clean image: a dead model")


def _check_alone(classify: Classify, images: Tensor, denoise: Denoise, clean: Tensor) -> None:
    rows = torch.arange(SAMPLES, device=images.device)
    x = images[rows % len(images)]
    noise = gaussian(0, Stream.AUDIT, rows, torch.zeros_like(rows), x.shape[1:])

    def logits(noise: Tensor, images: Tensor = x) -> Tensor:
        return classify(denoise(images, noise)).float()

    together = logits(noise)
    if not together.isfinite().all():
        raise DataError("the classifier's logits are not finite on noisy images")
    if (torch.cat([clean, together]) == together[0]).all():
        raise DataError("the classifier's logits do not depend on its input: a constant model")
    # float32 rounding of a logit that does not vary must not count.
    allowed = TOLERANCE * together.std(dim=0) + 1e-5 * together.abs().amax(dim=0)
    half = SAMPLES // 2

    def among(others: Tensor) -> Tensor:
        """The first half's logits in a batch whose second half is something else."""
        return logits(torch.cat([noise[:half], others]), torch.cat([x[:half], 1 - x[half:]]))[:half]

    seen = {
        "the order of its batch, or on chance": logits(noise.flip(0), x.flip(0)).flip(0) - together,
        "the others of its batch": torch.stack([among(5 * noise[half:] + 1), logits(noise[:half], x[:half])])
        - together[:half],
    }
    for on_what, difference in seen.items():
        if not (difference.abs() <= allowed).all():
            raise _dependent(on_what)
    # NaN reveals a dependence of any size. Last, since it would spoil running statistics.
    if not among(torch.full_like(noise[half:], torch.nan)).isfinite().all():
        raise _dependent("the others of its batch")


def _check_noise_first(images: Tensor, denoise: Denoise, sigma: float) -> None:
    """The same x + sigma * noise in two ways, with another x, must look the same to what comes after the noise.

    A diffusion's own noise is up to 0.8% above sigma: the tolerance is for that.
    """
    rows = torch.arange(min(SAMPLES, len(images)), device=images.device)
    x, other = images[rows], 0.25 + images[rows] / 2
    noise = gaussian(0, Stream.AUDIT, rows, torch.ones_like(rows), x.shape[1:])
    seen, again = denoise(x, noise).float(), denoise(other, noise + (x - other) / sigma).float()
    if not float((seen - again).abs().mean()) <= TOLERANCE * float(seen.std()):
        raise DataError(
            "what the classifier sees is not a function of x + sigma * noise alone: something acts on the image before "
            "the noise, such as a prompt, and no certificate would hold; apply it to the noisy image"
        )


def _dependent(on_what: str) -> DataError:
    return DataError(f"the classifier's answer for a sample depends on {on_what}: votes must be independent; remove "
                     "batch statistics, dropout and whatever else mixes samples")  # fmt: skip


def _check_labels(predicted: Tensor, labels: Tensor, num_classes: int) -> None:
    if int(labels.max()) >= num_classes or int(labels.min()) < 0:
        raise DataError(f"labels reach from {int(labels.min())} to {int(labels.max())}, the classifier has "
                        f"{num_classes} classes")  # fmt: skip
    classes = labels.unique()
    if len(labels) < JUDGED or len(classes) < 2:
        return
    recalls = sum(float((predicted[labels == label] == label).double().mean()) for label in classes)
    # A constant answer's recalls add up to exactly 1, however uneven the labels are.
    if recalls <= 1 + 1e-9:
        raise DataError(
            f"the classifier's mean recall on {len(labels)} clean images is {recalls / len(classes):.3f}, no better "
            f"than the {1 / len(classes):.3f} of a constant answer: a dead model, or labels of another data set"
        )
