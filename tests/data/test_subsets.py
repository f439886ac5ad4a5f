"""Splits and subsets: named, seeded, disjoint, and never fewer images than asked for."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from cadis_ray.data import DataSet, load
from cadis_ray.data.images import Pixels
from cadis_ray.data.settings import Data
from cadis_ray.data.splits import Split
from cadis_ray.data.subsets import test_rows as choose  # by its own name pytest would collect it
from cadis_ray.data.subsets import training_rows
from cadis_ray.errors import DataError, UsageError

LABELS = np.random.default_rng(0).integers(0, 5, 1_000)


def test_digits_are_split_as_ever() -> None:
    """Stored votes are addressed by these ids and this digest."""
    table: Any = load_digits()
    order = np.random.Generator(np.random.Philox(0)).permutation(1797)
    data = load(Data(name="digits"))
    for split, rows in ((data.test, order[:400]), (data.validation, order[400:800]), (data.train, order[800:])):
        ids = np.sort(rows)
        images = (table["images"][ids] / 16).astype(np.float32)
        assert np.array_equal(split.ids.numpy(), ids)
        content = [ids.astype(np.int64), table["target"][ids].astype(np.int64), images]
        assert split.digest() == hashlib.sha256(b"".join(part.tobytes() for part in content)).hexdigest()
    fewer = load(Data(name="digits", train=100))
    assert np.array_equal(fewer.train.ids.numpy(), np.sort(order[800:900]))
    assert torch.equal(fewer.validation.ids, data.validation.ids)


def test_validation_is_a_seeded_slice_of_the_training_images() -> None:
    validation, train = training_rows(1_000, 100, None, 3)
    assert sorted([*validation, *train]) == list(range(1_000))
    assert np.array_equal(train, np.sort(train))
    assert not np.array_equal(validation, np.sort(validation)), "the first of a sorted list of ids are of one class"
    more, _ = training_rows(1_000, 200, None, 3)
    assert np.array_equal(more[:100], validation)
    same, some = training_rows(1_000, 100, 50, 3)
    assert np.array_equal(same, validation)
    assert len(some) == 50
    assert set(some) <= set(train)
    other, _ = training_rows(1_000, 100, None, 4)
    assert set(other) != set(validation)
    assert len(training_rows(150, 100, 50, 0)[1]) == 50
    for train_count, total in ((51, 150), (None, 100)):
        with pytest.raises(UsageError, match=rf"validation 100 .* {total} training images"):
            training_rows(total, 100, train_count, 0)


def test_the_first_by_seed() -> None:
    rows = choose("first", LABELS, 200, 5, 1)
    assert len(set(rows)) == 200
    assert np.array_equal(choose("first", LABELS, 50, 5, 1), rows[:50])
    assert not np.array_equal(choose("first", LABELS, 200, 5, 2), rows)
    # Not the order of the validation images, which starts from the same numbers.
    assert not np.array_equal(training_rows(1_000, 200, None, 1)[0], rows)


def test_as_many_of_each_class() -> None:
    rows = choose("per_class", LABELS, 200, 5, 1)
    assert len(set(rows)) == 200
    assert np.bincount(LABELS[rows]).tolist() == [40] * 5
    for count in (5, 50, 100):
        assert np.bincount(LABELS[rows[:count]]).tolist() == [count // 5] * 5
        assert np.array_equal(choose("per_class", LABELS, count, 5, 1), rows[:count])
    assert not np.array_equal(choose("per_class", LABELS, 200, 5, 2), rows)
    with pytest.raises(UsageError, match="got 201; need a multiple of the 5 classes"):
        choose("per_class", LABELS, 201, 5, 1)
    with pytest.raises(DataError, match="class 5 has 0 test images; per_class needs 10"):
        choose("per_class", LABELS, 60, 6, 1)


def test_every_kth_is_that_of_cohens_logs() -> None:
    assert choose("every", np.zeros(10_000), 500, 10, 7).tolist() == list(range(0, 10_000, 20))
    assert choose("every", np.zeros(50_000), 500, 1_000, 7).tolist() == list(range(0, 50_000, 100))
    assert choose("every", np.zeros(7), 3, 1, 7).tolist() == [0, 2, 4]
    assert choose("every", np.zeros(7), 7, 1, 7).tolist() == list(range(7))


def test_more_test_images_than_there_are_are_refused() -> None:
    with pytest.raises(UsageError, match=r"data.test: got 1001; need at most the 1000 test images"):
        choose("first", LABELS, 1_001, 5, 0)


def test_a_training_image_cannot_be_certified() -> None:
    place = torch.arange(4)
    split = Split(Pixels(np.zeros((4, 1, 2, 2), np.uint8)), place, place, place)
    with pytest.raises(AssertionError, match="two splits"):
        DataSet("same", 4, split.first(2), Split(split.source, place, place, place + 4), split)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ([0.5, 1.0 + 1e-6], r"image 1: values outside \[0, 1\] \(min 1, max 1\): looks already normalised"),
        ([0.0, 0.5, -2.1, 7], r"image 2: values outside .*min -2.1.* \(2 such images\)"),
        ([0.5, np.nan, 2.0], r"image 1: 4 NaN values"),
        ([np.inf], "image 0: values outside"),
    ],
)
def test_pixels_that_are_not_in_the_unit_interval_are_refused(pixels: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Pixels(np.array(pixels, np.float32)[:, None, None, None] * np.ones((1, 2, 2), np.float32))
