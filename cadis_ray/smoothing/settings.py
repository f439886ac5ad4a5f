"""Sections of the study file that say how many votes are counted, on which images, and what is certified."""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from cadis_ray.interface.section import A_LIST, Count, NonNegative, Section, got


def _samples(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    allowed = "a number of samples, or a growing list of them such as [32, 128, 512]"
    try:
        found = validate(value)
    except ValidationError:  # else one message for each kind
        raise ValueError(f"got {got(value)}; need {allowed}") from None
    if any(later <= earlier for earlier, later in pairwise(schedule(found))):
        raise ValueError(f"got {value}; need {allowed}")
    return found


Samples = Annotated[Count | Annotated[tuple[Count, ...], A_LIST, Field(min_length=1)], WrapValidator(_samples)]


def schedule(samples: int | tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of samples an image can have, the first for all; see ``smoothing.estimate.next_samples``."""
    return samples if isinstance(samples, tuple) else (samples,)


class Validation(Section):
    """What a trial counts after each epoch: label-aware, few samples, many images. Never a certificate.

    ``samples``: of every image, or a growing list: an image goes on to the next number while at most two of its
    samples missed the label.
    """

    images: Count = 400
    samples: Samples = 64


class Finalists(Section):
    """After the search its best ``count`` trials are counted again, and the winner is chosen by that count alone.

    ``images``: of the validation images, None: all of them. ``samples`` as of validation, with noise of their own.
    """

    count: Annotated[int, Field(ge=1, le=3)] = 3
    images: Count | None = None
    samples: Samples = (32, 128, 512)


class Certification(Section):
    """Certificates on test images with fresh noise.

    ``mode`` protocol: CERTIFY of Cohen et al. 2019, n samples an image. sequential: at most n, fewer where ``radii``
    are settled before. estimate: a few samples an image and no certificate, not for a study. ``precision`` bf16: of
    the networks' insides; x_start, logits and argmax stay float32. It is another classifier, and has votes of its own.
    """

    mode: Literal["protocol", "sequential", "estimate"] = "protocol"
    precision: Literal["float32", "bf16"] = "float32"
    images: Count = 200
    n0: Count = 100
    n: Annotated[int, Field(ge=1, le=2**53)] = 10_000  # float64 tells every n up to there
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.001
    radii: Annotated[tuple[NonNegative, ...], A_LIST] = (0.0, 0.25, 0.5, 0.75)
