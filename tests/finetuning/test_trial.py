"""A trial's epochs: shares of workers add up, and a resumed trial is the undisturbed one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cadis_ray.data import DataSet, Split, load
from cadis_ray.errors import DataError
from cadis_ray.finetuning.base_classifier import load_finetuned
from cadis_ray.finetuning.batch import NonFiniteLoss
from cadis_ray.finetuning.checkpoint import WEIGHTS, save_checkpoint
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.finetuning.trial import Epoch, Interruption, Worker, trial_epochs
from cadis_ray.models.adapters.lora import trainable_state
from cadis_ray.study.load import load_study
from cadis_ray.study.study import configuration
from tests.helpers.places import DIGITS

STUDY = load_study(DIGITS)
SMALL = {"finetuning.epochs": 2, "finetuning.num_noises": 2, "finetuning.attack_steps": 1, "finetuning.lora.r": 2}
NOISES, SAMPLES = 2, 3


@pytest.fixture(scope="module")
def data() -> DataSet:
    whole = load(STUDY.base.data)
    return DataSet("digits", 10, whole.train.first(150), whole.validation.first(31), whole.test.first(10))


def pool(split: Split, draws: int, seed: int) -> np.ndarray:
    """A stand-in for denoised images: clean ones with a little noise, (draws, N, 1, 8, 8) float16."""
    noise = np.random.default_rng(seed).normal(0, 0.2, (draws, *split.images.shape))
    return np.clip(2 * split.images.numpy() - 1 + noise, -1, 1).astype(np.float16)


def epochs(data: DataSet, parameters: dict, **rest):
    chosen = configuration(STUDY, SMALL | parameters)
    validation = pool(data.validation, SAMPLES, 99)
    return chosen, trial_epochs(chosen, data, lambda e: pool(data.train, NOISES, e), validation, seed=1, **rest)


def save(folder: Path, epoch: Epoch, chosen: Configuration) -> Path:
    folder.mkdir()
    assert epoch.optimiser is not None
    save_checkpoint(folder, epoch.classifier, epoch.optimiser, chosen, seed=1, epoch=epoch.epoch)
    return folder


def test_the_shares_of_two_workers_add_up(data: DataSet) -> None:
    def counts(rank: int, world: int) -> np.ndarray:
        (only,) = epochs(data, {"finetuning.recipe": "none"}, worker=Worker(rank, world))[1]
        assert only.epoch == 0
        return only.counts

    shares = [counts(0, 2), counts(1, 2)]
    assert not (shares[0].any(axis=1) & shares[1].any(axis=1)).any()
    assert np.array_equal(shares[0] + shares[1], counts(0, 1))
    assert counts(0, 1).sum(axis=1).tolist() == [SAMPLES] * len(data.validation.ids)


def test_an_image_goes_on_while_at_most_two_of_its_samples_missed_the_label(data: DataSet) -> None:
    schedule = (4, 9, 20)
    chosen = configuration(STUDY, {"finetuning.recipe": "none", "validation.samples": schedule})
    noise = np.random.default_rng(5).normal(0, 0.5, (20, *data.validation.images.shape))
    denoised = np.clip(2 * data.validation.images.numpy() - 1 + noise, -1, 1).astype(np.float16)

    def counts(rank: int = 0, world: int = 1) -> np.ndarray:
        (only,) = trial_epochs(chosen, data, lambda e: denoised, denoised, seed=1, worker=Worker(rank, world))
        return only.counts

    classifier = load_finetuned(chosen, None)
    expected = []
    for image, label in enumerate(data.validation.labels.tolist()):
        with torch.inference_mode():
            votes = classifier(torch.from_numpy(denoised[:, image]).float()).argmax(1)
        taken = next((n for n in schedule if (votes[:n] != label).sum() > 2), 20)
        expected.append([*torch.bincount(votes[:taken], minlength=10).tolist(), 0])
    assert counts().tolist() == expected
    assert set(counts().sum(axis=1).tolist()) == {4, 9, 20}
    assert np.array_equal(counts(0, 2) + counts(1, 2), counts())


def test_a_resumed_trial_is_the_undisturbed_one(data: DataSet, tmp_path: Path) -> None:
    chosen, undisturbed = epochs(data, {})
    first = next(undisturbed)
    folder = save(tmp_path / "first", first, chosen)
    (last,) = undisturbed
    expected = trainable_state(last.classifier)
    ((again),) = epochs(data, {}, resume=folder)[1]
    assert again.epoch == last.epoch == 2
    assert np.array_equal(again.counts, last.counts)
    found = trainable_state(again.classifier)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("parameters", [{}, {"finetuning.recipe": "gaussian", "finetuning.drop_path": 0.3}])
def test_a_trial_that_left_within_an_epoch_is_the_undisturbed_one(
    data: DataSet, tmp_path: Path, parameters: dict
) -> None:
    """Weights, counts, and the epoch's means over all of its images."""
    folders = []

    def keep(reached: Interruption) -> None:
        folder = tmp_path / f"{reached.epoch}-{reached.standing.steps}"
        folder.mkdir()
        folders.append(folder)
        save_checkpoint(
            folder, reached.classifier, reached.optimiser, chosen, seed=1, epoch=reached.epoch,
            standing=reached.standing,
        )  # fmt: skip

    parameters = parameters | {"finetuning.batch_size": 6}  # 25 steps
    chosen, run = epochs(data, parameters, worker=Worker(leaving=lambda: True), keep=keep)
    *_, last = run
    assert [folder.name for folder in folders] == ["0-10", "1-10"]
    expected, steady = trainable_state(last.classifier), last.metrics.keys() - {"classifier_calls", "denoiser_calls"}
    for folder in folders:
        *_, again = epochs(data, parameters, resume=folder)[1]
        assert np.array_equal(again.counts, last.counts)
        assert {key: again.metrics[key] for key in steady} == pytest.approx({key: last.metrics[key] for key in steady})
        found = trainable_state(again.classifier)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_is_certified_is_what_was_trained(data: DataSet, tmp_path: Path) -> None:
    chosen, run = epochs(data, {})
    *_, last = run
    kept = load_finetuned(chosen, save(tmp_path / "last", last, chosen))
    images = 2 * data.test.images - 1
    with torch.inference_mode():
        last.classifier.eval()
        assert torch.allclose(kept(images), last.classifier(images), atol=1e-5)
        off_the_shelf = load_finetuned(configuration(STUDY, {"finetuning.recipe": "none"}), None)
        assert not torch.allclose(kept(images), off_the_shelf(images), atol=1e-2)


def test_a_damaged_checkpoint_is_refused_by_name(data: DataSet, tmp_path: Path) -> None:
    chosen, run = epochs(data, {"finetuning.recipe": "denoised_ce"})
    folder = save(tmp_path / "first", next(run), chosen)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(DataError, match=WEIGHTS):
        load_finetuned(chosen, folder)
    with pytest.raises(DataError, match=r"checkpoint\.json"):
        load_finetuned(chosen, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_trial(data: DataSet) -> None:
    with pytest.raises(NonFiniteLoss, match="epoch 0"):
        next(epochs(data, {"finetuning.base_lr": 1e30})[1])
