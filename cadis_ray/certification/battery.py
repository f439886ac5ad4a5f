"""Certificates of classifiers whose smoothed classifier is known exactly, against theory.

Every replicate is an image of its own, with the same content, so that its certificate is one more draw of the same
law. A linear classifier f(x) = [w.x + b > 0] has p_A = Phi((w.x + b) / (sigma |w|)) and the exact radius
(w.x + b) / |w| (Cohen et al. 2019, appendix B); a ball |x - c| <= r has p_A = F(r^2 / sigma^2) with F of the
noncentral chi-squared law. No single classifier sees every fault: an axis sees a channel or the tail, a dense
direction what correlates elements, the tie a selection that is not independent, the sphere the norm of the noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import optimize, stats
from torch import Tensor, nn

from cadis_ray.models.black_box import BlackBox, BlackBoxModel
from cadis_ray.models.denoisers.diffusion import Denoiser
from cadis_ray.models.denoisers.schedule import make_schedule
from cadis_ray.models.local_smoothing import LocalSmoothing
from cadis_ray.smoothing.certifier import certify_images
from cadis_ray.smoothing.noise import Stream, add_noise, gaussian
from cadis_ray.smoothing.sampling import Classify

SIGMA, N0, N, ALPHA = 0.5, 100, 400, 0.05  # a large alpha makes a wrong one visible in few replicates
SHAPE, NUM_CLASSES = (3, 6, 6), 3
ELEMENTS = 108
BLOCK, BATCH_SIZE = 100, 2048
NEVER = -1e9  # the logit of a class that is never voted for
FLAG = 1e-4
LOCAL_NOISES, LOCAL_SIGMA = 3, 0.25
CENTRE_DISTANCE = 20 * SIGMA  # nearer, the radius is far above Cohen's bound; farther, the norm of the noise is lost


@dataclass(frozen=True)
class Cell:
    """A classifier with class 0's exact ``probability`` under the noise and exact ``radius`` at the battery's image."""

    name: str
    classify: Classify
    probability: float
    radius: float
    denoise: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Finding:
    """``false`` certificates of M and how many theory ``expected``, the share of votes for class 0, and the p-values
    of coverage (C), mean (M) and dispersion (D)."""

    name: str
    probability: float
    share: float
    false: int
    expected: float
    p_values: dict[str, float]

    @property
    def flags(self) -> str:
        """The statistics that contradict theory, as ``CM``; empty: none does."""
        return "".join(name for name, p_value in self.p_values.items() if p_value < FLAG)


def image() -> Tensor:
    """The battery's one image (C, H, W)."""
    return torch.linspace(0.1, 0.9, ELEMENTS).reshape(SHAPE)


def cells(device: torch.device | str = "cpu") -> tuple[Cell, ...]:
    """The classifiers, on ``device``."""
    axis = torch.zeros(ELEMENTS, dtype=torch.float64)
    axis[ELEMENTS // 2] = 1
    dense = torch.linspace(-1, 1, ELEMENTS, dtype=torch.float64)
    linear = {"axis": (axis, 1.2), "axis tail": (axis, 2.3), "dense": (dense / dense.norm(), 1.8),
              "tie": (dense / dense.norm(), 0.0)}  # fmt: skip
    centre = image().flatten().to(device)
    made = []
    for name, (direction, z) in linear.items():
        classify = partial(_half_space, direction.float().to(device), z * SIGMA, centre)
        made.append(Cell(name, classify, float(stats.norm.cdf(z)), z * SIGMA))
    squared = float(stats.ncx2.ppf(0.885, ELEMENTS, (CENTRE_DISTANCE / SIGMA) ** 2))
    shifted = centre + CENTRE_DISTANCE / ELEMENTS**0.5
    ball = partial(_ball, shifted, squared * SIGMA**2)
    return *made, Cell("sphere", ball, *sphere(CENTRE_DISTANCE, squared**0.5 * SIGMA))


def cells_of_kinds(device: torch.device | str = "cpu") -> tuple[Cell, ...]:
    """Those of the other kinds of base classifier, behind the program's own parts, with laws as exact.

    denoised: noise of exactly sigma by a denoiser whose network is left out. local: the mean softmax of a half-space
    over fixed noises is a half-space with another threshold, which is solved for. black box: labels alone come back.
    """
    by_name = {cell.name: cell for cell in cells(device)}
    denoiser = Denoiser(nn.Identity(), make_schedule("cosine", 4000), channels=SHAPE[0]).eval()
    dense = torch.linspace(-1, 1, ELEMENTS, dtype=torch.float64)
    dense, threshold = dense / dense.norm(), local_threshold(dense / dense.norm())
    made = []
    for name in ("tie", "sphere"):
        cell = by_name[name]
        made.append(replace(cell, name=f"{name}, denoised", classify=Pixels(cell.classify), denoise=partial(
            _scaled_noise, denoiser)))  # fmt: skip
        box = BlackBoxModel(BlackBox(partial(_labels, cell.classify, device), NUM_CLASSES), None).eval()
        made.append(replace(cell, name=f"{name}, black box", classify=box, denoise=add_noise))
    for name, z in (("tie", 0.0), ("dense", 1.8)):
        half = partial(_half_space, dense.float().to(device), z * SIGMA + threshold, image().flatten().to(device))
        local = LocalSmoothing(Pixels(half), LOCAL_NOISES, LOCAL_SIGMA, seed=0)
        made.append(replace(by_name[name], name=f"{name}, local", classify=local.eval(), denoise=add_noise))
    return tuple(made)


def local_threshold(direction: Tensor) -> float:
    """The score at which the mean over the local noises of sigmoid(2 (score + sigma' direction.noise)) is 1/2."""
    addresses = torch.zeros(LOCAL_NOISES, dtype=torch.int64), torch.arange(LOCAL_NOISES)
    noises = gaussian(0, Stream.LOCAL, *addresses, SHAPE).flatten(1).double()
    moved = (LOCAL_SIGMA * noises @ direction).numpy()
    bracket = (-moved.max() - 1, -moved.min() + 1)
    return optimize.root_scalar(lambda score: np.tanh(score + moved).sum(), bracket=bracket, xtol=1e-14).root


class Pixels(nn.Module):
    """``classify`` of images on the [-1, 1] scale."""

    def __init__(self, classify: Classify) -> None:
        super().__init__()
        self.classify = classify
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.classify((images + 1) / 2)


def sphere(distance: float, r: float) -> tuple[float, float]:
    """(p_A, exact radius) at ``distance`` from the centre of the ball of radius ``r``, p_A > 1/2."""

    def probability(distance: float) -> float:
        return float(stats.ncx2.cdf((r / SIGMA) ** 2, ELEMENTS, (distance / SIGMA) ** 2))

    even = optimize.root_scalar(lambda distance: probability(distance) - 0.5, bracket=(distance, r)).root
    return probability(distance), even - distance


def failure_rate(probability: float, radius: float, n: int, alpha: float, sigma: float) -> float:
    """The exact probability that a Clopper-Pearson certificate exceeds ``radius``.

    It does when k votes of n refute p <= Phi(radius / sigma) at level alpha: from the k on at which
    P(Bin(n, Phi(radius / sigma)) >= k) < alpha. At radius 0: the probability of a certificate at all.
    """
    at_least = stats.binom.sf(np.arange(-1, n), n, stats.norm.cdf(radius / sigma))
    refuting = int((at_least >= alpha).sum())
    return float(stats.binom.sf(refuting - 1, n, probability))


def run(
    replicates: int,
    seed: int,
    device: torch.device | str = "cpu",
    names: Sequence[str] | None = None,
) -> list[Finding]:
    """Certify every classifier ``replicates`` times, of ``names`` only if given, and compare with theory.

    Coverage: certificates beyond the exact radius, one-sided against their exact probability. Mean: votes against
    Bin(replicates * N, p_A). Dispersion: the counts' variance between replicates against N p_A (1 - p_A).
    """
    findings = []
    for index, cell in enumerate((*cells(device), *cells_of_kinds(device))):
        if names is None or cell.name in names:
            ids = torch.arange(replicates, device=device) + index * replicates
            findings.append(_finding(cell, ids, seed))
    return findings


def _finding(cell: Cell, ids: Tensor, seed: int) -> Finding:
    images = image().to(ids.device).expand(len(ids), *SHAPE)
    found = certify_images(
        cell.classify, images, ids=ids, sigma=SIGMA, n0=N0, n=N, alpha=ALPHA, seed=seed, num_classes=NUM_CLASSES,
        batch_size=BATCH_SIZE, block=BLOCK, denoise=cell.denoise,
    )  # fmt: skip
    false = int(((found.predict > 0) | (found.radius > cell.radius)).sum())
    votes, p, m = found.estimation[:, 0], cell.probability, len(ids)
    rate = failure_rate(p, cell.radius, N, ALPHA, SIGMA)
    total, dispersion = int(votes.sum()), float(((votes - N * p) ** 2).sum() / (N * p * (1 - p)))
    return Finding(cell.name, p, total / (m * N), false, m * rate, {
        "C": float(stats.binom.sf(false - 1, m, rate)),
        "M": _two_sided(stats.binom.cdf(total, m * N, p), stats.binom.sf(total - 1, m * N, p)),
        "D": _two_sided(stats.chi2.cdf(dispersion, m), stats.chi2.sf(dispersion, m)),
    })  # fmt: skip


def _two_sided(below: ArrayLike, above: ArrayLike) -> float:
    return min(1.0, 2 * float(np.minimum(below, above)))


def _scaled_noise(denoiser: Denoiser, images: Tensor, noise: Tensor, sigma: float) -> Tensor:
    x_t = denoiser.add_noise(images, noise, sigma, "pixel")
    return x_t / float(denoiser.schedule.alpha_bar[denoiser.timestep(sigma)]) ** 0.5


def _labels(classify: Classify, device: torch.device | str, pixels: np.ndarray) -> np.ndarray:
    return classify(torch.from_numpy(pixels).to(device)).argmax(dim=1).cpu().numpy()


def _half_space(direction: Tensor, margin: float, centre: Tensor, images: Tensor) -> Tensor:
    return _two_classes((images.flatten(1) - centre) @ direction + margin)


def _ball(centre: Tensor, squared_radius: float, images: Tensor) -> Tensor:
    return _two_classes(squared_radius - (images.flatten(1) - centre).square().sum(dim=1))


def _two_classes(score: Tensor) -> Tensor:
    return torch.stack([score, -score, torch.full_like(score, NEVER)], dim=1)
