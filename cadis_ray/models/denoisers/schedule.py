"""The noise schedule of a diffusion model, and the timestep at which its noise matches sigma. NumPy only."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Schedule:
    """``alpha_bar`` (T,) float64, falling: x_t = sqrt(alpha_bar[t]) x_start + sqrt(1 - alpha_bar[t]) noise.

    x_start lives in [-1, 1], sigma on images in [0, 1]; hence the factor 2 between the two scales.
    """

    alpha_bar: np.ndarray

    @property
    def steps(self) -> int:
        """Number of timesteps T; timesteps are 0 .. T-1."""
        return len(self.alpha_bar)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest sigma that has a timestep."""
        return self.sigma_at(0), self.sigma_at(self.steps - 1)

    def sigma_at(self, t: int) -> float:
        """Std of the noise on images in [0, 1] that x_t carries at timestep ``t``."""
        return float(_model_sigma(self.alpha_bar[t])) / 2

    def timestep(self, sigma: float) -> int:
        """First t >= 1 with sqrt(1 - alpha_bar) / sqrt(alpha_bar) >= 2 sigma (Carlini et al. 2023, algorithm 2).

        The noise at that timestep is a little above sigma, so that a certificate that uses sigma is sound.
        Raises ValueError if sigma is outside ``sigma_range``.
        """
        low, high = self.sigma_range
        if not low <= sigma <= high:
            raise ValueError(f"sigma must be in [{low:.6g}, {high:.6g}] for this schedule, but got {sigma}")
        return 1 + int(np.searchsorted(_model_sigma(self.alpha_bar[1:]), 2 * sigma, side="left"))


def make_schedule(name: str, steps: int) -> Schedule:
    """The schedules of OpenAI's programs for ``steps`` timesteps. Raises ValueError for any other name.

    linear: betas from 0.1/steps to 20/steps (Ho et al. 2020, for 1000 steps 1e-4 to 0.02); cosine: alpha_bar(u) =
    cos^2((u + 0.008)/1.008 * pi/2) with betas of at most 0.999 (Nichol & Dhariwal 2021, eq. 17).
    """
    if steps < 2:
        raise ValueError(f"a schedule needs at least 2 steps, but got {steps}")
    if name == "linear":
        betas = np.linspace(0.1 / steps, 20 / steps, steps)
    elif name == "cosine":
        signal = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    else:
        raise ValueError(f"the schedule must be linear or cosine, but got {name!r}")
    if betas[-1] >= 1:
        raise ValueError(f"the linear schedule needs more than 20 steps, but got {steps}")
    return Schedule(np.cumprod(1 - betas))


def _model_sigma(alpha_bar: np.ndarray) -> np.ndarray:
    """Std of the noise relative to the signal on the [-1, 1] scale."""
    return np.sqrt(1 - alpha_bar) / np.sqrt(alpha_bar)
