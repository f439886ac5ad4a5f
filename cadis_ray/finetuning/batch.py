"""What a training step takes, and how far an epoch has come."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """A part of one worker's share of a batch, on the model's device; images as for ``ft_cadis_loss``, noisy instead of
    denoised ones where the recipe takes these.

    ``scale`` multiplies the loss, a mean over the part's images: n_part * workers / n_global, because gradients of
    parts are added and those of workers averaged. The sum is the gradient of the global mean.
    """

    clean: Tensor
    denoised: Tensor
    labels: Tensor
    scale: float = 1.0


class Standing(NamedTuple):
    """How far an epoch has come: ``steps`` taken, and over ``images`` the sums of what ``train_epoch`` gives means of,
    up to the gradient norm."""

    steps: int = 0
    images: int = 0
    sums: tuple[float, ...] = (0.0,) * 6


BEGINNING = Standing()


class NonFiniteLoss(ArithmeticError):
    """Loss or gradient of ``step`` (from 0, over all epochs) is not finite; it has not been taken."""

    def __init__(self, epoch: int, step: int) -> None:
        super().__init__(epoch, step)
        self.epoch = epoch
        self.step = step

    def __str__(self) -> str:
        return f"loss or gradient not finite in epoch {self.epoch}, step {self.step}"
