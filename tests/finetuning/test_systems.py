"""Every system of the study of systems trains, is counted, and is certified beside the others."""

import numpy as np
import pytest
import torch

from cadis_ray.certification.counting import Count
from cadis_ray.certification.request import Model, Request, certified_images, sources_of
from cadis_ray.data import DataSet, load
from cadis_ray.finetuning.checkpoint import save_checkpoint
from cadis_ray.finetuning.trial import Epoch, trial_epochs
from cadis_ray.models.adapters.lora import trainable_parameters
from cadis_ray.smoothing.noise import Stream
from cadis_ray.study.load import load_study
from cadis_ray.study.study import configuration
from tests.helpers.places import STUDIES

STUDY = load_study(STUDIES / "systems_digits.yaml")
SMALL = {"finetuning.epochs": 1, "finetuning.batch_size": 20}
IMAGES, SAMPLES = 4, 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Epoch, Model]]:
    """One epoch of every baseline on few images, and its checkpoint."""
    whole, found = load(STUDY.base.data), {}
    data = DataSet("digits", 10, whole.train.first(40), whole.validation.first(IMAGES), whole.test.first(1))
    chance = np.random.default_rng(0)
    pool = [chance.uniform(-1, 1, (4, 40, 1, 8, 8)), chance.uniform(-1, 1, (SAMPLES, IMAGES, 1, 8, 8))]
    training, validation = (draws.astype(np.float16) for draws in pool)
    for name, changes in STUDY.baselines.items():
        chosen = configuration(STUDY, changes | SMALL)
        (last,) = trial_epochs(chosen, data, lambda _: training, validation, seed=0)
        folder = None
        if last.optimiser is not None:
            folder = tmp_path_factory.mktemp(name)
            save_checkpoint(folder, last.classifier, last.optimiser, chosen, seed=0, epoch=1)
        found[name] = (last, Model(chosen, folder))
    return found


def test_every_system_reports_what_it_trains_and_costs(trained: dict[str, tuple[Epoch, Model]]) -> None:
    votes = IMAGES * SAMPLES
    for name, (last, model) in trained.items():
        settings, metrics = model.configuration.finetuning, last.metrics
        assert last.counts.sum() == votes, name
        assert (trainable_parameters(last.classifier) > 0) == (settings.recipe != "none"), name
        trained_on = 0 if settings.recipe == "none" else 40 * settings.num_noises
        local = 3 if model.configuration.kind == "local_smoothing" else 1
        if settings.recipe in ("denoised_ce", "gaussian", "peft_smoothing", "none"):
            assert metrics["classifier_calls"] == trained_on + votes * local, name
        denoises = model.configuration.kind in ("denoise_then_classify", "local_smoothing")
        on_denoised = trained_on if settings.recipe in ("ft_cadis", "denoised_ce") else 0
        assert metrics["denoiser_calls"] == on_denoised + (votes if denoises else 0), name
    assert trained["smoothadv"][0].metrics["classifier_calls"] == 40 * 2 * 3 + votes
    assert trained["black_box_prompt"][0].metrics["queries"] == 40 * 2 * 2 + votes
    assert trained["black_box"][0].metrics["queries"] == votes


def test_all_are_certified_under_the_same_noise_with_keys_of_their_own(
    trained: dict[str, tuple[Epoch, Model]],
) -> None:
    request = Request(STUDY.base, {name: model for name, (_, model) in trained.items()}, seed=0)
    test, _ = certified_images(STUDY.base)
    sources = {name: own[Stream.ESTIMATION] for name, own in sources_of(request, test).items()}
    assert len(set(sources.values())) == len(sources)
    assert len({source.denoiser for source in sources.values()}) == 2
    item = {"rows": [0, 1], "stream": int(Stream.ESTIMATION), "start": 0, "size": 6, "block": 6}
    actor = Count(request, 16, "cpu", 1)
    (together,) = actor(item | {"models": list(trained)})
    assert (together["votes"].sum(axis=2) == 6).all()
    for name in ("ft_cadis", "peft_prompt", "diffsmooth", "black_box"):
        (alone,) = actor(item | {"models": [name]})
        assert np.array_equal(alone["votes"][0], together["votes"][list(trained).index(name)]), name
    noisy, box = (together["votes"][list(trained).index(name)] for name in ("off_the_shelf_noisy", "black_box"))
    assert np.array_equal(noisy, box)  # behind the box is the same classifier
    assert torch.get_num_threads() == 1
