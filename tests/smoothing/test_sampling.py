"""Sampling in batches of many images equals sampling one at a time, and has the law that certificates assume."""

import itertools
import math

import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor

from cadis_ray.smoothing.noise import Stream, gaussian
from cadis_ray.smoothing.sampling import fastest_batch, sample_votes

SIGMA = 0.5
DIRECTION = torch.linspace(-1, 1, 16).reshape(1, 4, 4)
IMAGES = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([5, 900, 7])


def noisy(images: Tensor, noise: Tensor) -> Tensor:
    return images + SIGMA * noise


def linear(images: Tensor) -> Tensor:
    score = (images * DIRECTION).flatten(1).sum(1)
    return torch.stack([score, -score], dim=1)


def votes(
    start: int = 0, size: int = 40, batch_size: int = 64, stream: Stream = Stream.ESTIMATION, models=(linear,)
) -> Tensor:
    return sample_votes(
        IMAGES, IDS, noisy, models, num_classes=2, seed=3, stream=stream, start=start, size=size, batch_size=batch_size
    )


def test_equals_one_image_and_sample_at_a_time() -> None:
    expected = torch.zeros(1, 3, 3, dtype=torch.int64)
    for row, (image, number) in enumerate(zip(IMAGES, IDS, strict=True)):
        for sample in range(40):
            noise = gaussian(3, Stream.ESTIMATION, number[None], torch.tensor([sample]), image.shape)
            expected[0, row, linear(noisy(image[None], noise)).argmax()] += 1
    assert torch.equal(votes(), expected)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 10_000])
def test_neither_batches_nor_blocks_change_a_count(batch_size: int) -> None:
    blocks = votes(0, 13, batch_size) + votes(13, 20, batch_size) + votes(33, 7, batch_size)
    assert torch.equal(blocks, votes())
    assert votes(batch_size=batch_size).sum(-1).tolist() == [[40, 40, 40]]


def test_vote_shares_are_those_of_gaussian_noise_of_this_sigma() -> None:
    """For a linear classifier P(vote) = Phi(margin / sigma): another sigma, or a sample used twice, shows."""
    n = 20_000
    found = votes(size=n, batch_size=4096)[0, :, 0].tolist()
    for image, count in zip(IMAGES, found, strict=True):
        margin = float((image * DIRECTION).sum()) / float(DIRECTION.norm())
        low, high = binom.interval(1 - 1e-6, n, norm.cdf(margin / SIGMA))
        assert low <= count <= high


def test_classifiers_share_the_noise_and_streams_do_not() -> None:
    both = votes(models=(linear, lambda images: linear(images).flip(1)))
    assert torch.equal(both[0, :, [0, 1]], both[1, :, [1, 0]])
    assert not torch.equal(votes(stream=Stream.SELECTION), votes())


def test_a_model_that_is_not_finite_votes_for_no_class() -> None:
    assert votes(models=(lambda images: linear(images) * math.nan,))[0].tolist() == [[0, 0, 40]] * 3


def test_batches_are_halved_where_memory_runs_out() -> None:
    def small(images: Tensor) -> Tensor:
        if len(images) > 10:
            raise torch.OutOfMemoryError("no room")
        return linear(images)

    assert torch.equal(votes(models=(linear, small)), votes(models=(linear, linear)))

    def none(images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        votes(models=(none,))


def test_only_wanted_images_are_counted() -> None:
    wanted = torch.tensor([[True, False, True], [False, False, False]])
    found = sample_votes(
        IMAGES, IDS, noisy, (linear, linear), num_classes=2, seed=3, stream=Stream.ESTIMATION, start=0, size=40,
        batch_size=16, wanted=wanted,
    )  # fmt: skip
    assert torch.equal(found, votes(models=(linear, linear)) * wanted[:, :, None])


def test_the_fastest_batch_stays_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 0.01)  # it ticks with every batch, whatever its size: larger is faster
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def small(images: Tensor) -> Tensor:
        now[0] = next(clock)
        if len(images) > 300:
            raise torch.OutOfMemoryError("no room")
        return linear(images)

    assert fastest_batch(IMAGES, noisy, [small]) == 256


def test_a_batch_that_takes_long_is_not_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    largest = []

    def slow(images: Tensor) -> Tensor:  # the larger the faster for each image
        now[0] += len(images) ** 0.5 / 10
        largest.append(len(images))
        return linear(images)

    assert fastest_batch(IMAGES, noisy, [slow]) == 128
    assert max(largest) == 128  # 1.13 s
