import math

import pytest
import torch
from scipy import stats

from cadis_ray.smoothing.noise import Stream, _box_muller, gaussian, philox4x32

# Random123 1.14, examples/kat_vectors, philox4x32 with 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


def philox_of_integers(counter, key):
    """Philox4x32-10 in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 % 2**32, p0 >> 32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, output):
    k0, k1 = words(key)
    c0, c1, c2, c3 = (torch.tensor([word]) for word in words(counter))
    assert [int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1))] == words(output)
    assert list(philox_of_integers(words(counter), (k0, k1))) == words(output)


def test_the_address_is_seed_stream_image_sample_element():
    image, sample, seed, stream = 2**32 - 1, 3_000_000_000, 4_000_000_000, Stream.AUDIT
    noise = gaussian(seed, stream, torch.tensor([image]), torch.tensor([sample]), (10,))[0]
    for element in range(10):
        lane = element % 4
        word = philox_of_integers((element // 4, sample, image, 0), (seed, stream))
        radial, angular = word[lane // 2 * 2], word[lane // 2 * 2 + 1]
        radius = math.sqrt(-2 * math.log((radial + 1) / 2**32))
        angle = 2 * math.pi * angular / 2**32
        expected = radius * (math.sin(angle) if lane % 2 else math.cos(angle))
        assert float(noise[element]) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (3, 112, 112)])
def test_noise_is_bit_equal_however_it_is_batched(shape):
    count = 40 if shape[-1] < 100 else 3
    images, samples = torch.arange(count) % 4 + 11, torch.arange(count) // 4
    together = gaussian(5, Stream.ESTIMATION, images, samples, shape)
    assert together.shape == (count, *shape)
    assert together.dtype == torch.float32
    for batch in (1, 2, 7, 16):
        parts = zip(images.split(batch), samples.split(batch), strict=True)
        assert torch.equal(torch.cat([gaussian(5, Stream.ESTIMATION, *part, shape) for part in parts]), together)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gaussian(5, Stream.ESTIMATION, images[order], samples[order], shape), together[order])


@pytest.fixture(scope="module")
def sheet():
    """Noise of 64 images x 256 samples x 65 elements (65: the last counter is cut)."""
    images, samples = torch.meshgrid(torch.arange(64), torch.arange(256), indexing="ij")
    return gaussian(0, Stream.ESTIMATION, images.flatten(), samples.flatten(), (65,)).view(64, 256, 65)


def test_noise_is_standard_normal(sheet):
    values = sheet.double().numpy()
    assert stats.kstest(values[:16].ravel(), "norm").pvalue > 1e-3
    assert stats.kstest((values**2).sum(axis=2).ravel(), "chi2", args=(65,)).pvalue > 1e-3
    for threshold in (3.0, 4.0):
        expected = values.size * 2 * stats.norm.sf(threshold)
        assert abs((abs(values) > threshold).sum() - expected) < 4 * math.sqrt(expected)


def test_neighbours_are_not_correlated(sheet):
    others = [
        gaussian(0, Stream.SELECTION, torch.arange(64), torch.zeros(64, dtype=torch.int64), (65,)),
        gaussian(1, Stream.ESTIMATION, torch.arange(64), torch.zeros(64, dtype=torch.int64), (65,)),
    ]
    pairs = [
        *[(sheet[..., :-lag], sheet[..., lag:]) for lag in (1, 2, 3, 4)],
        (sheet[:, :-1], sheet[:, 1:]),
        (sheet[:-1], sheet[1:]),
        (sheet[:, :64], sheet[:, :64].transpose(0, 1)),
        *[(sheet[:, 0], other) for other in others],
    ]
    for a, b in pairs:
        off_diagonal = a != b  # an image and a sample of one number share their noise with themselves
        a, b = a[off_diagonal], b[off_diagonal]
        for power in (1, 2):
            correlation = torch.corrcoef(torch.stack([a.double() ** power, b.double() ** power]))[0, 1]
            assert abs(float(correlation)) < 5 / math.sqrt(len(a))


def test_streams_and_seeds_share_no_noise():
    ids = torch.arange(3)
    draws = [gaussian(seed, stream, ids, ids, (8,)) for seed in (0, 1, 2**32 - 1) for stream in Stream]
    assert len(torch.stack(draws).unique()) == len(draws) * 3 * 8


def test_the_ends_of_the_words_are_finite():
    ends = torch.tensor([0, 1, 2**31, 2**32 - 1])
    cosine, sine = torch.empty(4), torch.empty(4)
    _box_muller(ends.clone(), ends, cosine, sine)
    radius = torch.hypot(cosine, sine)
    assert radius.isfinite().all()
    assert float(radius[0]) == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)
    assert float(radius[3]) == 0


@pytest.mark.parametrize(
    ("seed", "images", "samples"),
    [
        (-1, [0], [0]),
        (2**32, [0], [0]),
        (0, [-1], [0]),
        (0, [2**32], [0]),
        (0, [0], [2**32]),
        (0, [0, 1], [0]),
        (0, [[0]], [[0]]),
        (0, [0.0], [0]),
    ],
)
def test_addresses_out_of_range_are_refused(seed, images, samples):
    with pytest.raises(ValueError, match="must be"):
        gaussian(seed, Stream.SEARCH, torch.tensor(images), torch.tensor(samples), (4,))


def test_an_unknown_stream_is_refused():
    with pytest.raises(ValueError, match="Stream"):
        gaussian(0, len(Stream), torch.tensor([0]), torch.tensor([0]), (4,))  # pyright: ignore[reportArgumentType]
