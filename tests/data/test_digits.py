"""The embedded default: real images, disjoint seeded splits, models that do what they are for."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from cadis_ray.data import DataSet, load
from cadis_ray.data.settings import Data
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.models.classifiers.classifier import load_classifier
from cadis_ray.models.denoisers.diffusion import load_denoiser
from cadis_ray.storage.references import resolve
from cadis_ray.study.load import load_study
from tests.helpers.places import DIGITS

STUDY = DIGITS


@pytest.fixture(scope="module")
def base() -> Configuration:
    return load_study(STUDY).base


@pytest.fixture(scope="module")
def digits(base: Configuration) -> DataSet:
    return load(base.data)


def test_the_images_are_scikit_learns(digits: DataSet) -> None:
    expected: Any = load_digits()
    for split in (digits.train, digits.validation, digits.test):
        images, labels = expected["images"][split.ids] / 16, expected["target"][split.ids]
        assert np.array_equal(split.images[:, 0].numpy(), images.astype(np.float32))
        assert np.array_equal(split.labels.numpy(), labels)


def test_every_image_lies_in_exactly_one_split(digits: DataSet) -> None:
    ids = torch.cat([digits.train.ids, digits.validation.ids, digits.test.ids])
    assert torch.equal(ids.sort().values, torch.arange(1797))
    assert (len(digits.validation.ids), len(digits.test.ids)) == (400, 400)


def test_splits_go_by_seed_and_test_by_nothing_else() -> None:
    one, again = load(Data(name="digits", seed=1)), load(Data(name="digits", seed=1, validation=10))
    assert torch.equal(one.test.ids, again.test.ids)
    assert not torch.equal(one.test.ids, load(Data(name="digits", seed=2)).test.ids)


def test_an_image_in_two_splits_is_refused(digits: DataSet) -> None:
    with pytest.raises(AssertionError, match="two splits"):
        DataSet("digits", 10, digits.train, digits.test, digits.test)


def test_more_images_than_there_are_is_refused(digits: DataSet) -> None:
    assert len(digits.test.first(400).ids) == 400
    with pytest.raises(ValueError, match="401"):
        digits.test.first(401)


@torch.inference_mode()
def test_the_embedded_classifier_is_right_on_clean_test_images(base: Configuration, digits: DataSet) -> None:
    c = base.classifier
    classifier = load_classifier(c.library, c.name, c.checkpoint, c.config, c.normalise)
    right = classifier(2 * digits.test.images - 1).argmax(1) == digits.test.labels
    assert right.double().mean() >= 0.96


@torch.inference_mode()
def test_the_embedded_denoiser_removes_most_of_the_noise(base: Configuration, digits: DataSet) -> None:
    denoiser = load_denoiser(base.denoiser.family, base.denoiser.checkpoint, base.denoiser.config)
    images = digits.test.images
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    left = (denoiser.denoise(images, noise, base.sigma) + 1) / 2 - images
    assert left.square().mean() < 0.25 * base.sigma**2


def test_the_embedded_files_are_small() -> None:
    folder = resolve("package:digits_denoiser.safetensors").parent
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4e6
