"""The forecast's counts are those of the networks and of the loss; its ranges go by the hardware."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cadis_ray.errors import UsageError
from cadis_ray.finetuning.base_classifier import load_finetuned
from cadis_ray.finetuning.passes import passes_an_image
from cadis_ray.finetuning.recipes.ft_cadis import ft_cadis_loss
from cadis_ray.models.denoisers.diffusion import load_denoiser
from cadis_ray.smoothing.settings import schedule
from cadis_ray.study.flops import flops_of
from cadis_ray.study.forecast import HARDWARE, forecast, lines, parse_hardware
from cadis_ray.study.load import load_study
from cadis_ray.study.study import Study, changed
from tests.helpers.places import STUDIES

DIGITS = load_study(STUDIES / "digits.yaml")


def digits(**changes: Any) -> Study:
    """Digits with other resources or fine-tuning."""
    resources = {key: changes.pop(key) for key in [*changes] if key in type(DIGITS.resources).model_fields}
    finetuning = DIGITS.base.finetuning.model_copy(update=changes)
    return DIGITS.model_copy(
        update={
            "resources": DIGITS.resources.model_copy(update=resources),
            "base": DIGITS.base.model_copy(update={"finetuning": finetuning}),
            "space": {},
        }
    )


def test_operations_are_those_of_the_networks_with_their_weights() -> None:
    base = DIGITS.base.model_copy(update={"finetuning": DIGITS.base.finetuning.model_copy(update={"recipe": "none"})})
    classifier, model = load_finetuned(base, None), base.denoiser
    denoiser = load_denoiser(model.family, model.checkpoint, model.config)
    found = flops_of(base, (1, 8, 8))
    for network, expected in ((lambda x: classifier(x), found.classifier),
                              (lambda x: denoiser.unet(x, torch.tensor([3])), found.denoiser)):  # fmt: skip
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 1, 8, 8))
        assert expected == counter.get_total_flops()
    # 16 patches of 2 x 2 and a class token, 3 blocks of width 64: what the matrices of a ViT multiply.
    tokens, width = 17, 64
    block = 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width
    assert found.classifier == 2 * 16 * 4 * width + 3 * block + 2 * width * 10
    assert found.trained == 0


def test_what_is_trained_is_the_adapters_and_the_head() -> None:
    r, width = 4, 64
    assert flops_of(DIGITS.base, (1, 8, 8)).trained == 3 * 2 * r * 2 * width + 10 * width + 10


@pytest.mark.parametrize(("adv_weight", "attack_steps"), [(0.0, 3), (1.0, 1), (1.0, 4)])
def test_training_is_worth_as_many_passes_as_the_loss_takes(adv_weight: float, attack_steps: int) -> None:
    torch.manual_seed(0)
    # Wide inside, narrow outside: neither the first layer, which has no gradient before it, nor the last counts.
    layers = [nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    classifier = nn.Sequential(nn.Flatten(), *layers, nn.Linear(128, 3))
    clean = torch.rand(5, 1, 2, 2) - 0.5
    denoised = clean + 1e-4 * torch.randn(2, 5, 1, 2, 2)
    labels = classifier(clean).argmax(1)
    with FlopCounterMode(display=False) as one:
        classifier(clean[:1])
    with FlopCounterMode(display=False) as counter:
        losses = ft_cadis_loss(
            classifier, clean, denoised, labels, adv_weight=adv_weight, attack_radius=0.01, attack_steps=attack_steps
        )
        losses.total.backward()
    assert losses.mask_share == 1
    settings = {"adv_weight": adv_weight, "attack_steps": attack_steps, "num_noises": 2, "epochs": 1}
    chosen = changed(DIGITS.base, {f"finetuning.{key}": value for key, value in settings.items()})
    worth = 5 * passes_an_image(chosen).worth
    assert counter.get_total_flops() / one.get_total_flops() == pytest.approx(worth, rel=0.06)


def test_time_is_operations_over_rate_and_units() -> None:
    study = digits(attack_steps=2, num_noises=2, epochs=5)
    flops = flops_of(study.base, (1, 8, 8))
    rate = HARDWARE["cpu"].float32.high
    trial = 997 * 5 * 2 * (3 + 3 + 2 * 2) + 400 * 48 * 5
    cross_entropy = 997 * 5 * 4 * 3 + 400 * 48 * 5
    passes = 8 * trial + cross_entropy + 400 * 48  # and the baseline that does not train
    found = forecast(study, "cpu", 2)
    pool, search, finalists, certification = found.stages
    assert search.busy.high == pytest.approx(passes * flops.classifier / rate)
    assert pool.busy.high == pytest.approx((997 * 5 * 4 + 400 * 48) * flops.denoiser / rate)
    assert certification.busy.high == pytest.approx(400 * 500 * (flops.denoiser + 3 * flops.classifier) / rate)
    both, most = flops.denoiser + 4 * flops.classifier, max(schedule(study.finalists.samples))
    assert finalists.busy.high == pytest.approx(400 * most * both / rate)
    assert finalists.busy.low == pytest.approx(400 * 32 * both / HARDWARE["cpu"].float32.low)
    assert found.wall.high * 3600 == pytest.approx(sum(stage.busy.high for stage in found.stages) / 2, abs=75)
    assert found.price.high == pytest.approx(found.wall.high * 2 * HARDWARE["cpu"].price.high)
    assert found.hours.low < found.hours.high


def test_every_system_is_forecast_with_what_its_training_and_its_votes_take() -> None:
    study = load_study(STUDIES / "systems_digits.yaml")
    assert forecast(study, "cpu", 2).wall.low > 0

    def passes(**changes: Any) -> float:
        chosen = changed(DIGITS.base, {f"finetuning.{key}": value for key, value in changes.items()})
        return passes_an_image(chosen).worth

    one = {"num_noises": 1}
    assert passes(recipe="none", **one) == 0
    assert passes(recipe="gaussian", **one) == 3
    assert passes(recipe="smoothadv", attack_steps=4, **one) == 3 + 2 * 4
    behind = {
        "black_box.endpoint": "cadis_ray.models.shipped:digits",
        "black_box.classes": 10,
        "finetuning.recipe": "black_box_prompt",
        "finetuning.coordinator.averages": 3,
    }
    black_box = changed(DIGITS.base, behind | {f"finetuning.{key}": value for key, value in one.items()})
    assert passes_an_image(black_box).worth == 6
    flops, rate = flops_of(DIGITS.base, (1, 8, 8)), HARDWARE["cpu"].float32.high
    local = DIGITS.model_copy(update={"base": changed(DIGITS.base, {
        "base_classifier.kind": "local_smoothing", "base_classifier.local_noises": 7,
    }), "baselines": {}})  # fmt: skip
    found = forecast(local, "cpu", 2).stages[3]
    assert found.busy.high == pytest.approx(400 * 500 * (flops.denoiser + 7 * flops.classifier) / rate)


def test_the_demo_is_forecast_as_it_was_measured() -> None:
    """5 min 35 s on 2 cores, benchmarks/RESULTS.md."""
    found = forecast(DIGITS, "cpu", 2)
    assert 0.65 * 335 < found.wall.low * 3600 < 335 < found.wall.high * 3600 < 1.3 * 335


def test_more_units_than_the_study_asks_for_change_the_price_only() -> None:
    two, many = forecast(digits(), "cpu", 2), forecast(digits(), "cpu", 64)
    assert many.wall == two.wall
    assert many.price.high == pytest.approx(32 * two.price.high)


def test_several_trials_share_a_gpu_by_fractions() -> None:
    shared = {"workers_per_trial": 1, "concurrent_trials": 8, "actors": 4, "gpus_per_actor": 0.5}
    for share, at_a_time in ((0.25, 8), (0.5, 4), (1.0, 2)):
        found = forecast(digits(**shared, gpus_per_worker=share), "h200", 2)
        assert found.stages[1].units == at_a_time * share
        assert found.stages[3].units == 2
    text = "\n".join(lines(found))
    assert "nothing measured" in text
    assert text.isascii()


@pytest.mark.parametrize(
    ("hardware", "resources", "said"),
    [
        ("cray=1", {}, "KIND=COUNT"),
        ("cpu", {}, "KIND=COUNT"),
        ("cpu=0", {}, "KIND=COUNT"),
        ("h200=8", {}, "ask for no GPU"),
        ("cpu=8", {"gpus_per_worker": 1.0}, "ask for GPUs"),
        ("h200=8", {"gpus_per_worker": 1.0}, "gpus_per_actor is 0"),
        ("cpu=2", {"workers_per_trial": 3}, "one trial of the study's resources needs 3"),
    ],
)
def test_hardware_that_the_study_cannot_use_is_refused(hardware: str, resources: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        forecast(digits(**resources), *parse_hardware(hardware))
