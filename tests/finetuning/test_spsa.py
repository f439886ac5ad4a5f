"""SPSA with gradient correction: its estimate, its rate on a quadratic, and a black-box trial that it trains."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cadis_ray.data import DataSet, load
from cadis_ray.errors import UsageError
from cadis_ray.finetuning.base_classifier import adapted_classifier, load_finetuned, model_identity
from cadis_ray.finetuning.batch import Batch, NonFiniteLoss
from cadis_ray.finetuning.checkpoint import save_checkpoint
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.finetuning.recipes.spsa import SpsaGc, spsa_epoch
from cadis_ray.finetuning.trial import Epoch, trial_epochs
from cadis_ray.models.adapters.coordinator import Coordinator
from cadis_ray.models.adapters.lora import trainable_state
from cadis_ray.models.black_box import BlackBox, BlackBoxModel
from cadis_ray.study.load import load_study
from cadis_ray.study.study import configuration
from tests.helpers.places import DIGITS

STUDY = load_study(DIGITS)


def quadratic(w: Tensor, curvature: float = 1.0) -> float:
    return 0.5 * curvature * float(w.square().sum())


def test_in_one_dimension_each_step_is_the_recursion_of_the_paper() -> None:
    """There a quadratic's estimate is its gradient, whatever D: the gains and the correction are all that is left."""
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimiser, x, m = SpsaGc([w], a=0.3, c=0.05, momentum=0.8, averages=3), 1.0, 0.0
    for k in range(1, 12):
        optimiser.step(lambda: quadratic(w, 1.7))
        g = 1.7 * x
        m = 0.8 * m + g
        x -= 0.3 / (k + 1) ** 0.4 * (g + 0.8 * m)
        assert w.item() == pytest.approx(x, rel=1e-9)


@pytest.mark.parametrize(("a", "momentum"), [(0.05, 0.0), (0.05, 0.6), (0.02, 0.9)])
def test_a_quadratic_is_descended_at_the_rate_of_the_accelerated_gradient(a: float, momentum: float) -> None:
    """With constant gains (w, m) is multiplied by a matrix: w_k is a sum of its eigenvalues' powers."""
    h = 1.3
    matrix = np.array([[1 - a * h * (1 + momentum), -a * momentum**2], [h, momentum]])
    values, vectors = np.linalg.eig(matrix)
    shares = np.linalg.solve(vectors, [1.0, 0.0])
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimiser = SpsaGc([w], a=a, momentum=momentum, averages=1, decays=(0.0, 0.0))
    for k in range(1, 61):
        optimiser.step(lambda: quadratic(w, h))
        expected = float((vectors[0] * shares * values**k).sum().real)
        assert w.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert abs(w.item()) < 2 * np.abs(values).max() ** 60 * np.abs(shares).max()


def test_the_estimate_is_unbiased_in_many_dimensions() -> None:
    """E[D_j / D_i] = 0 for i != j: the mean of many estimates is the gradient, within their standard error."""
    weights = torch.linspace(-2, 2, 9, dtype=torch.float64)
    w = nn.Parameter(torch.zeros(9, dtype=torch.float64))
    draws = []
    for seed in range(600):
        with torch.no_grad():
            w.zero_()
        SpsaGc([w], a=1.0, momentum=0.0, averages=1, seed=seed, decays=(0.0, 0.1)).step(lambda: float(weights @ w))
        draws.append(-w.detach().clone())
    found = torch.stack(draws)
    error = found.std(dim=0) / 600**0.5
    assert ((found.mean(dim=0) - weights).abs() < 4 * error).all()
    assert error.max() < 0.4


def test_directions_are_of_half_to_one_with_even_signs_and_addressed() -> None:
    w = nn.Parameter(torch.zeros(4000))
    optimiser = SpsaGc([w], seed=3)
    (direction,) = optimiser._directions([w], 1, 0)
    assert ((direction.abs() >= 0.5) & (direction.abs() <= 1)).all()
    assert abs(float(direction.sign().mean())) < 0.06
    assert abs(float(direction.abs().mean()) - 0.75) < 0.01
    assert torch.equal(direction, SpsaGc([w], seed=3)._directions([w], 1, 0)[0])
    assert not torch.equal(direction, optimiser._directions([w], 2, 0)[0])


class Sealed:
    """A wrapped model that raises at anything but a call with plain numbers."""

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        assert type(pixels) is np.ndarray
        return (pixels.reshape(len(pixels), -1)[:, :30] - 0.3).reshape(len(pixels), 10, 3).sum(2)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AssertionError(f"the black box was asked for its {name}")


def prompted(**settings: Any) -> Configuration:
    changes: dict[str, Any] = {
        "finetuning.recipe": "black_box_prompt", "black_box.endpoint": "cadis_ray.models.shipped:digits",
        "black_box.classes": 10, "finetuning.batch_size": 16, "finetuning.num_noises": 1, "finetuning.epochs": 2,
    }  # fmt: skip
    return configuration(STUDY, changes | settings)


def test_a_wrapped_model_is_never_touched_and_its_loss_falls() -> None:
    encoder = adapted_classifier(configuration(STUDY, {"finetuning.recipe": "none"}), 0)
    coordinator = Coordinator(encoder, channels=1, trigger=4, hidden=4, strength=1.0, seed=0)  # type: ignore[arg-type]
    model = BlackBoxModel(BlackBox(Sealed(), 10), coordinator)
    images, labels = torch.randn(1, 32, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(32).long()
    batch = [Batch(images[0], images, labels)]
    optimiser = SpsaGc([p for p in model.parameters() if p.requires_grad], a=0.3, c=0.02, averages=2)
    first, *_, last = [spsa_epoch(model, optimiser, [batch], epoch=e, first_step=e)["loss"] for e in range(60)]
    assert last < first - 0.1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_prompt_begins_as_none_and_is_a_function_of_each_noisy_image_alone() -> None:
    model = adapted_classifier(prompted(), seed=0)
    assert isinstance(model, BlackBoxModel)
    images = torch.randn(5, 1, 8, 8)
    assert model.coordinator is not None
    with torch.inference_mode():
        assert torch.equal(model.coordinator(images), images)
    nn.init.normal_(model.coordinator.decoder[-2].weight)  # type: ignore[arg-type]
    with torch.inference_mode():
        together = model.coordinator(images)
        assert torch.allclose(model.coordinator(images[2:3]), together[2:3], atol=1e-6)
    assert 1e-3 < (together - images).abs().max() <= 1


@pytest.fixture(scope="module")
def data() -> DataSet:
    whole = load(STUDY.base.data)
    return DataSet("digits", 10, whole.train.first(32), whole.validation.first(10), whole.test.first(1))


def test_a_black_box_trial_reports_its_queries_and_resumes_as_undisturbed(data: DataSet, tmp_path: Path) -> None:
    unused, chosen = np.full((4, 10, 1, 8, 8), np.nan, np.float16), prompted()

    def run(**more: Any) -> list[Epoch]:
        return list(trial_epochs(chosen, data, lambda _: unused, unused, seed=1, **more))

    steps = trial_epochs(chosen, data, lambda _: unused, unused, seed=1)
    first = next(steps)
    queries = 32 * 5 * 2 + 4 * 10  # two sides of five estimates of each batch, then the votes
    assert (first.metrics["queries"], first.metrics["classifier_calls"], first.metrics["denoiser_calls"]) == (
        queries, queries, 0,
    )  # fmt: skip
    assert first.optimiser is not None
    save_checkpoint(tmp_path, first.classifier, first.optimiser, chosen, seed=1, epoch=1)
    (last,) = steps
    (again,) = run(resume=tmp_path)
    assert np.array_equal(again.counts, last.counts)
    expected, found = trainable_state(last.classifier), trainable_state(again.classifier)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not any(key.startswith("coordinator.encoder") for key in expected)
    images = torch.randn(3, 1, 8, 8)
    loaded = load_finetuned(chosen, tmp_path)
    plain = load_finetuned(prompted(**{"finetuning.recipe": "none", "base_classifier.kind": "black_box"}), None)
    assert not torch.equal(loaded(images), plain(images))
    renamed = prompted(**{"black_box.version": "2"})
    assert model_identity(renamed, tmp_path) != model_identity(chosen, tmp_path)
    slower = prompted(**{"black_box.rate": 1.0, "black_box.retries": 7})
    assert model_identity(slower, tmp_path) == model_identity(chosen, tmp_path)


def test_a_loss_that_is_not_finite_takes_no_step() -> None:
    model = nn.Linear(1, 1)
    optimiser = SpsaGc(model.parameters())
    before = model.weight.item()
    assert not np.isfinite(optimiser.step(lambda: float("nan")))
    assert model.weight.item() == before

    class Diverged(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.full((len(images), 2), torch.nan)

    batch = [Batch(torch.zeros(2, 1, 2, 2), torch.zeros(1, 2, 1, 2, 2), torch.zeros(2).long())]
    with pytest.raises(NonFiniteLoss):
        spsa_epoch(Diverged(), optimiser, [batch], epoch=0, first_step=0)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(UsageError, match="black_box cannot be trained by the recipe gaussian"):
        adapted_classifier(prompted(**{"finetuning.recipe": "gaussian", "base_classifier.kind": "black_box"}), 0)
