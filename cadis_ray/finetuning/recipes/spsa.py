"""Training without gradients: SPSA with gradient correction (BlackVIP, Oh et al. 2023)."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cadis_ray.finetuning.batch import Batch, NonFiniteLoss
from cadis_ray.finetuning.recipes.ft_cadis import mean_ce_loss


class SpsaGc(torch.optim.Optimizer):
    """w <- w - a_k (g + b m), m <- b m + g, a_k = a / (k + 1)^0.4, k = 1, 2, ...

    g is the mean of ``averages`` estimates (L(w + c_k D) - L(w - c_k D)) / (2 c_k D), elementwise, c_k = c / k^0.1, the
    elements of D being +-U[0.5, 1), a function of (``seed``, k, which estimate): workers that share the loss take the
    same step, and a resumed run that of an undisturbed one. A step evaluates L 2 * ``averages`` times, and no gradient.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        a: float = 0.01,
        c: float = 0.01,
        momentum: float = 0.9,
        averages: int = 5,
        seed: int = 0,
        decays: tuple[float, float] = (0.4, 0.1),
    ) -> None:
        super().__init__(list(parameters), {"lr": a, "c": c, "momentum": momentum, "averages": averages})
        self.seed, self._decays = seed, decays

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        """Takes one step; ``closure`` evaluates L at the parameters' present values. Returns the mean of what it saw.

        A loss that is not finite changes nothing and is returned.
        """
        (group,) = self.param_groups
        parameters: list[Tensor] = group["params"]
        taken = self.state[parameters[0]].get("step")
        k = 1 if taken is None else int(taken) + 1
        rate, radius = group["lr"] / (k + 1) ** self._decays[0], group["c"] / k ** self._decays[1]
        start = [parameter.clone() for parameter in parameters]
        estimate, seen = [torch.zeros_like(parameter) for parameter in parameters], []
        for repeat in range(group["averages"]):
            directions = self._directions(parameters, k, repeat)
            sides = []
            for sign in (1, -1):
                for parameter, value, direction in zip(parameters, start, directions, strict=True):
                    parameter.copy_(value + sign * radius * direction)
                sides.append(closure())
            seen += sides
            slope = (sides[0] - sides[1]) / (2 * radius * group["averages"])
            for total, direction in zip(estimate, directions, strict=True):
                total += slope / direction
        mean = sum(seen) / len(seen)
        for parameter, value, found in zip(parameters, start, estimate, strict=True):
            parameter.copy_(value)
            if not math.isfinite(mean):
                continue
            state: dict[str, Any] = self.state[parameter]
            before = state.get("momentum", torch.zeros_like(parameter))
            state["momentum"] = group["momentum"] * before + found
            state["step"] = torch.tensor(float(k))
            parameter -= rate * (found + group["momentum"] * state["momentum"])
        return mean

    def _directions(self, parameters: Sequence[Tensor], k: int, repeat: int) -> list[Tensor]:
        entropy = np.random.SeedSequence([self.seed, k, repeat]).generate_state(2, np.uint32)
        generator = torch.Generator().manual_seed(int(entropy[0]) << 32 | int(entropy[1]))
        drawn = [torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) for parameter in parameters]
        # [0, 1) -> one half of it is the sign, the other the size in [0.5, 1).
        return [
            (torch.where(u < 0.5, 1.0, -1.0) * (0.5 + (2 * u).fmod(1) / 2)).to(parameter)
            for u, parameter in zip(drawn, parameters, strict=True)
        ]


def spsa_epoch(
    model: nn.Module,
    optimiser: SpsaGc,
    batches: Iterable[Sequence[Batch]],
    *,
    epoch: int,
    first_step: int,
    average: Callable[[float], float] = float,
) -> dict[str, float]:
    """One step a batch on the cross-entropy at noisy images; keys loss and images, means over this worker's images.

    ``average``: a number's mean over the workers. Raises NonFiniteLoss where no step could be taken.
    """
    total, images = 0.0, 0
    model.eval()
    for step, parts in enumerate(batches, first_step):

        def loss(parts: Sequence[Batch] = parts) -> float:
            own = sum(float(mean_ce_loss(model, part.denoised, part.labels).total) * part.scale for part in parts)
            return average(own)

        found, size = optimiser.step(loss), sum(len(part.labels) for part in parts)
        if not math.isfinite(found):
            raise NonFiniteLoss(epoch, step)
        total, images = total + found * size, images + size
    if not images:
        raise ValueError(f"epoch {epoch} has no batches")
    return {"loss": total / images, "images": float(images)}
