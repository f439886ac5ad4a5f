"""Gaussian noise with an address: a pure function of (root seed, stream, image, sample, element).

No state is drawn from, so noise does not depend on batch size, order, shards, workers or restarts. The
generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
2011) in int64 arithmetic.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

WORD = 2**32
MASK = WORD - 1
# The paper's multipliers less 2**32: negative, and so small that a product with a word stays within int64.
MULTIPLIERS = (0xD2511F53 - WORD, 0xCD9E8D57 - WORD)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
CHUNK = 8192  # counters at a time on a CPU: the dozen int64 buffers in flight stay within the cache
TURN = 2 * math.pi

Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Stream(IntEnum):
    """What noise is used for. Certificates hold only while these never share samples.

    LOCAL: the inner noises of local smoothing, which are part of a classifier.
    """

    SEARCH = 0
    SELECTION = 1
    ESTIMATION = 2
    AUDIT = 3
    TRAINING = 4
    LOCAL = 5


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of a counter of four words under a key of two; a word is an integer in [0, 2**32).

    Counter words are int64 tensors that broadcast, and so are the four returned: equal on every device.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = (high1 ^ c1) ^ k0, low1, (high0 ^ c3) ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _multiply(words: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of words * (multiplier + 2**32)."""
    product = words * multiplier
    return (product >> 32).add_(words), product & MASK


def gaussian(
    root_seed: int,
    stream: Stream,
    images: Tensor,
    samples: Tensor,
    shape: Sequence[int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise (B, *shape), float32, for the pairs (images[b], samples[b]).

    ``images`` and ``samples`` are int64 (B,) in [0, 2**32), ``root_seed`` is in [0, 2**32); ``device`` None
    is that of ``images``. Key (root_seed, stream), counter (element // 4, sample, image, 0), Box-Muller in
    float32: four normals a counter, none beyond 6.67 (probability 3e-11). Words are equal on every device,
    normals within float32 rounding.

    Raises ValueError outside these ranges. A certificate is void if a (stream, image, sample) is counted
    twice, or if the noise is rounded or clipped before it is added.
    """
    if not 0 <= root_seed < WORD:
        raise ValueError(f"root_seed must be in [0, 2**32), got {root_seed}")
    stream = Stream(stream)
    if images.ndim != 1 or images.shape != samples.shape:
        raise ValueError(f"images and samples must be (B,), got {tuple(images.shape)} and {tuple(samples.shape)}")
    device = torch.device(device) if device is not None else images.device
    images, samples = _words("images", images, device), _words("samples", samples, device)
    elements = math.prod(shape)
    blocks = -(-elements // 4)
    batch = len(images)
    noise = torch.empty(batch, 4 * blocks, device=device)
    index = torch.arange(blocks, device=device)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    # Rows, then columns: an image of 3 x 224 x 224 alone would already overflow the cache.
    rows = max(1, CHUNK // max(blocks, 1)) if device.type == "cpu" else max(batch, 1)
    columns = CHUNK if device.type == "cpu" else max(blocks, 1)
    for b in range(0, batch, rows):
        image, sample = images[b : b + rows, None], samples[b : b + rows, None]
        for e in range(0, blocks, columns):
            words = philox4x32((index[e : e + columns], sample, image, zero), (root_seed, int(stream)))
            out = noise[b : b + rows, 4 * e : 4 * (e + columns)].unflatten(1, (-1, 4))
            _box_muller(words[0], words[1], out[..., 0], out[..., 1])
            _box_muller(words[2], words[3], out[..., 2], out[..., 3])
    return noise[:, :elements].reshape(batch, *shape)


def _words(name: str, values: Tensor, device: torch.device) -> Tensor:
    if values.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {values.dtype}")
    if len(values) and not (int(values.min()) >= 0 and int(values.max()) < WORD):
        raise ValueError(f"{name} must be in [0, 2**32), got {int(values.min())} to {int(values.max())}")
    return values.to(device)


def _box_muller(radial: Tensor, angular: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """Write two normals made of two words; (word + 1) / 2**32 is in (0, 1], so its logarithm is finite."""
    radius = radial.add_(1).float().mul_(1 / WORD).log_().mul_(-2).sqrt_()
    angle = angular.float().mul_(TURN / WORD)
    torch.mul(radius, angle.cos(), out=cosine)
    torch.mul(radius, angle.sin(), out=sine)


def add_noise(images: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """2 (x + sigma noise) - 1, not clamped: noisy images on the classifiers' scale. ``images`` in [0, 1]."""
    return (images + sigma * noise).mul_(2).sub_(1)
