"""A smoothed classifier read back from its folder counts what the engine counts, and refuses what is no image."""

from pathlib import Path

import numpy as np
import pytest

from cadis_ray.certification.counting import Count
from cadis_ray.certification.request import Model, Request, certified_images
from cadis_ray.errors import DataError, UsageError
from cadis_ray.results.export.smoothed import SmoothedClassifier, as_tensor, save_smoothed
from cadis_ray.smoothing.bounds import predict
from cadis_ray.smoothing.noise import Stream
from cadis_ray.study.load import load_study
from cadis_ray.study.study import changed
from tests.helpers.places import DIGITS

SETTINGS = {"certification.images": 5, "certification.n0": 20, "certification.n": 100}
BASE = changed(load_study(DIGITS).base, SETTINGS | {"finetuning.recipe": "none"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoothed")
    save_smoothed(folder, BASE, BASE, None)
    return folder


@pytest.fixture(scope="module")
def smoothed(folder: Path) -> SmoothedClassifier:
    return SmoothedClassifier.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"base_classifier.kind": "classify"},
        {"base_classifier.kind": "local_smoothing"},
        {"finetuning.recipe": "ft_cadis", "finetuning.adapter": "prompt"},
    ],
)
def test_what_the_folder_cannot_hold_is_refused(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(UsageError, match="cannot be saved so yet"):
        save_smoothed(tmp_path / "new", BASE, changed(BASE, changes), None)
    assert not (tmp_path / "new").exists()


def engine_votes(seed: int) -> dict[Stream, np.ndarray]:
    """(5, 11) of each stream, of the same model by the engine's actor."""
    count = Count(Request(BASE, {"model": Model(BASE, None)}, seed), 64, "cpu", 1)
    item = {"rows": np.arange(5), "models": ["model"], "start": 0, "block": 100}
    sizes = {Stream.SELECTION: 20, Stream.ESTIMATION: 100}
    return {s: next(iter(count(item | {"stream": int(s), "size": n})))["votes"][0] for s, n in sizes.items()}


def test_counts_are_the_engines(smoothed: SmoothedClassifier) -> None:
    test, _ = certified_images(BASE)
    images = test.images.numpy().transpose(0, 2, 3, 1)
    found = smoothed.certify(images, test.ids.numpy(), n0=20, n=100, alpha=0.001, seed=3)
    expected = engine_votes(3)
    assert np.array_equal(found.selection, expected[Stream.SELECTION])
    assert np.array_equal(found.estimation, expected[Stream.ESTIMATION])
    assert not np.array_equal(found.estimation, engine_votes(4)[Stream.ESTIMATION])


def test_prediction_abstains_where_the_votes_are_too_few(smoothed: SmoothedClassifier) -> None:
    test, _ = certified_images(BASE)
    images = test.images.numpy().transpose(0, 2, 3, 1)
    found = smoothed.certify(images, n0=100, n=10, alpha=0.001, seed=3)
    assert smoothed.predict(images, 100, 0.001, seed=3).tolist() == predict(found.selection, 0.001).tolist()
    assert smoothed.predict(images, 2, 0.001).tolist() == [-1] * 5


def test_bytes_and_floats_agree(smoothed: SmoothedClassifier) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    arguments = {"n0": 10, "n": 60, "alpha": 0.01, "seed": 1}
    of_bytes, of_floats = smoothed.certify(images, **arguments), smoothed.certify(images / 255, **arguments)
    assert np.array_equal(of_bytes.estimation, of_floats.estimation)
    assert np.array_equal(of_bytes.radius, of_floats.radius)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((1, 8, 8, 1), np.int64), "int64"),
        (np.zeros((1, 1, 8, 8)), r"need \(N, 8, 8, 1\)"),
        (np.zeros((8, 8, 1)), r"need \(N, 8, 8, 1\)"),
        (np.full((1, 8, 8, 1), 255.0), r"\[0, 1\]"),
        (np.full((1, 8, 8, 1), np.nan), r"\[0, 1\]"),
    ],
)
def test_what_is_no_image_is_refused(images: np.ndarray, said: str) -> None:
    with pytest.raises(DataError, match=said):
        as_tensor(images, [1, 8, 8], 1)


def test_the_folder_holds_no_pickle_and_is_checked(folder: Path, tmp_path: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "classifier.safetensors",
        "denoiser.safetensors",
        "smoothed.json",
    }
    with pytest.raises(UsageError, match="not empty"):
        save_smoothed(folder, BASE, BASE, None)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "denoiser.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match="damaged"):
        SmoothedClassifier.load(tmp_path)
