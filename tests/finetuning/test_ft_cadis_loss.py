"""The FT-CADIS loss against the authors' program, finite differences and closed forms."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cadis_ray.errors import DataError
from cadis_ray.finetuning import ft_cadis_loss
from cadis_ray.finetuning.attack import adversarial_residuals
from cadis_ray.finetuning.recipes import ft_cadis as loss_module
from cadis_ray.finetuning.recipes.ft_cadis import Losses, denoised_ce_loss
from tests.helpers.places import GOLDEN

ATTACK: dict[str, Any] = {"adv_weight": 2.0, "attack_radius": 0.25, "attack_steps": 4}


class TinyConv(nn.Module):
    def __init__(self, size: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8 * size * size // 4, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.avg_pool2d(self.conv(images).tanh(), 2).flatten(1))


class Linear(nn.Module):
    """Logits = the image's pixels, so that a test can write down what it wants to be said."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.gain * images.flatten(1)


def golden(name: str) -> tuple[TinyConv, dict[str, Tensor], dict[str, Any]]:
    data = load_file(GOLDEN / f"{name}.safetensors")
    model = TinyConv()
    weights = {key.removeprefix("weight."): data[key] for key in data if key.startswith("weight.")}
    model.load_state_dict(weights)
    return model, data, json.loads((GOLDEN / f"{name}.json").read_text())


def loss_on_golden(model: nn.Module, data: dict[str, Tensor], **settings: Any) -> Losses:
    return ft_cadis_loss(model, 2 * data["x"] - 1, data["denoised"], data["y"], **ATTACK | settings)


def says(*logits: list[list[float]]) -> Tensor:
    """Denoised images (M, B, 1, 1, K) on which ``Linear`` gives these logits: one (B, K) table per noise."""
    return torch.tensor(logits)[:, :, None, None, :]


@pytest.fixture
def official() -> tuple[TinyConv, dict[str, Tensor], dict[str, Any]]:
    return golden("loss_official")


@pytest.mark.parametrize("name", ["loss_official", "loss_no_renorm"])
def test_parity_with_the_authors_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, settings = golden(name)
    seen = {}

    def recorded(classifier: nn.Module, clean: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen["clean"], seen["target"] = clean, rest[1]
        seen["eta"] = adversarial_residuals(classifier, clean, *rest, **options)
        return seen["eta"]

    monkeypatch.setattr(loss_module, "adversarial_residuals", recorded)
    losses = loss_on_golden(
        model,
        data,
        adv_weight=settings["lam"],
        attack_radius=settings["eps"],
        attack_steps=settings["pgd_steps"],
        renormalise=settings["renormalise"],
        warm_start=settings["warm_start"],
    )
    losses.total.backward()
    assert losses.sce.item() == pytest.approx(data["loss_sce"].item(), abs=1e-5)
    assert losses.madv.item() * settings["lam"] == pytest.approx(data["loss_madv_times_lambda"].item(), abs=1e-5)
    assert losses.total.item() == pytest.approx(data["loss_total"].item(), abs=1e-5)
    for key, parameter in model.named_parameters():
        expected = data[f"grad.{key}"]
        assert parameter.grad is not None
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), key

    clean = 2 * data["x"] - 1
    rows = torch.tensor([(clean == row).flatten(1).all(1).nonzero().item() for row in seen["clean"]])
    assert 0 < len(rows) < len(clean)
    torch.testing.assert_close(seen["eta"], data["eta_star"][:, rows], atol=1e-5, rtol=0)
    torch.testing.assert_close(seen["target"], data["consistency_target"][rows], atol=1e-6, rtol=0)


def test_attack_on_all_images_agrees_with_golden() -> None:
    for name in ("loss_official", "loss_no_renorm"):
        model, data, settings = golden(name)
        eta = adversarial_residuals(
            model,
            2 * data["x"] - 1,
            data["denoised"],
            data["consistency_target"],
            radius=settings["eps"],
            steps=settings["pgd_steps"],
            renormalise=settings["renormalise"],
        )
        torch.testing.assert_close(eta, data["eta_star"], atol=1e-5, rtol=0)


def test_attacking_masked_images_equals_attacking_all(official: Any) -> None:
    """The oracle attacks every image and masks afterwards, as the authors do."""
    model, data, _ = official
    clean, denoised, labels = 2 * data["x"] - 1, data["denoised"], data["y"]
    log_p = torch.stack([model(row) for row in denoised]).log_softmax(-1)
    target = log_p.exp().mean(0)
    eta = adversarial_residuals(model, clean, denoised, target.detach(), radius=0.25, steps=4, renormalise=True)
    log_q = torch.stack([model(clean + row) for row in eta]).log_softmax(-1)
    divergence = (target * (target.log() - log_q)).sum(-1).amax(0)
    mask = (log_p.argmax(-1) == labels).all(0)
    model.zero_grad()
    madv = (mask * divergence).mean()
    expected = torch.autograd.grad(madv, list(model.parameters()), retain_graph=True)

    losses = loss_on_golden(model, data, adv_weight=1.0)
    cross_entropy = -log_p.gather(-1, labels.expand(4, -1)[..., None])[..., 0]
    assert losses.madv.item() == pytest.approx(madv.item(), abs=1e-6)
    assert losses.mask_share.item() == pytest.approx(mask.float().mean().item())
    losses.total.backward()
    chosen = log_p.argmax(-1) == labels
    none = ~chosen.any(0)
    assert none.any(), "the batch must exercise the warm start"
    sce = (cross_entropy * chosen).sum(0) / 4 + none * cross_entropy.amin(0) / 4
    grads = torch.autograd.grad(sce.mean(), list(model.parameters()))
    for parameter, adversarial, selective in zip(model.parameters(), expected, grads, strict=True):
        torch.testing.assert_close(parameter.grad, adversarial + selective, atol=1e-6, rtol=1e-4)
    assert losses.sce.item() == pytest.approx(sce.mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"detach_target": False, "reduction": "mean"},
        {"target": "label"},
        {"select": "confidence", "confidence": 0.3},
        {"select": "all", "mask": "none"},
        {"warm_start": False},
    ],
)
def test_gradient_of_the_whole_loss_by_finite_differences(
    switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with eta* held: the method does not differentiate through the attack."""
    model, data, _ = golden("loss_official")
    model.double()
    data = {key: value.double() if value.is_floating_point() else value for key, value in data.items()}
    held: list[Tensor] = []

    def once(*arguments: Any, **options: Any) -> Tensor:
        if not held:
            held.append(adversarial_residuals(*arguments, **options))
        return held[0]

    monkeypatch.setattr(loss_module, "adversarial_residuals", once)
    total = loss_on_golden(model, data, **switches).total
    gradients = torch.autograd.grad(total, list(model.parameters()))
    assert held
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
        analytic = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
        values = []
        step = 1e-6
        for shift in (step, -2 * step, step):
            with torch.no_grad():
                for parameter, direction in zip(model.parameters(), directions, strict=True):
                    parameter += shift * direction
            values.append(loss_on_golden(model, data, **switches).total.item())
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(analytic, rel=1e-6)


def test_detached_target_drops_the_gradient_through_the_target(official: Any) -> None:
    model, data, _ = official
    values, gradients = [], []
    for detach in (False, True):
        losses = loss_on_golden(model, data, detach_target=detach)
        values.append(losses.total.item())
        gradients.append(torch.autograd.grad(losses.total, model.fc.weight)[0])
    assert values[0] == values[1]
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


A, B = 0.9, -0.4  # A is the correct logit where the label is the first class
RIGHT, WRONG, WORSE = [A, 0.0, B], [0.0, A, B], [B, A, 0.0]


def ce(logits: list[float], label: int = 0) -> float:
    return math.log(sum(math.exp(value) for value in logits)) - logits[label]


def closed_form(denoised: Tensor, **settings: Any) -> Losses:
    clean, labels = torch.zeros_like(denoised[0]), torch.zeros(denoised.shape[1], dtype=torch.long)
    base: dict[str, Any] = {"adv_weight": 1.0, "attack_radius": 0.1, "attack_steps": 0}
    return ft_cadis_loss(Linear(), clean, denoised, labels, **base | settings)


def test_selection_rules_in_closed_form() -> None:
    """Two images, two noises: (right, wrong) and (wrong, worse)."""
    denoised = says([RIGHT, WRONG], [WRONG, WORSE])
    right, wrong, worse = ce(RIGHT), ce(WRONG), ce(WORSE)
    confidence = math.exp(-wrong) - 1e-3
    for switches, sce, share in (
        ({}, (right / 2 + wrong / 2) / 2, 1 / 4),
        ({"warm_start": False}, right / 4, 1 / 4),
        ({"select": "all"}, (right + 2 * wrong + worse) / 4, 1.0),
        ({"select": "confidence", "confidence": confidence}, (right + 2 * wrong) / 4, 3 / 4),
        ({"select": "confidence", "confidence": 1.0}, (right / 2 + wrong / 2) / 2, 0.0),
    ):
        losses = closed_form(denoised, **switches)
        assert losses.sce.item() == pytest.approx(sce, rel=1e-6), switches
        assert losses.selected_share.item() == pytest.approx(share)
        assert losses.mask_share.item() == losses.madv.item() == 0
        assert losses.total.item() == losses.sce.item()


def test_warm_start_adds_nothing_where_one_is_selected() -> None:
    """Not even a wrong image whose cross-entropy is lower than that of the right one."""
    barely_right, barely_wrong = [0.1, 0.0, 0.0], [0.9, 1.0, -1.0]
    assert ce(barely_wrong) < ce(barely_right)
    losses = closed_form(says([barely_right], [barely_wrong]))
    assert losses.sce.item() == pytest.approx(ce(barely_right) / 2)


def test_adversarial_term_in_closed_form_without_steps() -> None:
    """T = 0: eta* = eta, so the term is the disagreement among the denoised images themselves."""
    other = [0.5, 0.3, 0.1]
    denoised = says([RIGHT, RIGHT], [other, WRONG])
    p = torch.tensor([RIGHT, other], dtype=torch.float64).softmax(-1)
    target = p.mean(0)
    kl = (target * (target / p).log()).sum(-1)
    for switches, expected in (
        ({}, kl.max().item() / 2),
        ({"reduction": "mean"}, kl.mean().item() / 2),
        ({"target": "label"}, max(ce(RIGHT), ce(other)) / 2),
        ({"target": "label", "reduction": "mean"}, (ce(RIGHT) + ce(other)) / 4),
    ):
        losses = closed_form(denoised, adv_weight=3.0, **switches)
        assert losses.madv.item() == pytest.approx(expected, rel=1e-5), switches
        assert losses.total.item() == pytest.approx(losses.sce.item() + 3 * expected, rel=1e-5)
        assert losses.mask_share.item() == 0.5
    unmasked = closed_form(denoised, mask="none", target="label")
    assert unmasked.madv.item() == pytest.approx((max(ce(RIGHT), ce(other)) + max(ce(RIGHT), ce(WRONG))) / 2)
    assert unmasked.mask_share.item() == 1


def test_frozen_selection_decides_selection_and_mask() -> None:
    """A judge that negates every logit finds the wrong image right and the right image wrong."""

    class Contrary(Linear):
        def forward(self, images: Tensor) -> Tensor:
            return -images.flatten(1)

    denoised = says([WORSE, RIGHT], [WORSE, RIGHT])
    judge = Contrary().train()
    losses = closed_form(denoised, selection_classifier=judge, warm_start=False, target="label")
    assert losses.sce.item() == pytest.approx(ce(WORSE) / 2)
    assert losses.madv.item() == pytest.approx(ce(WORSE) / 2)
    assert judge.training
    assert judge.gain.requires_grad


def test_attack_climbs_within_its_ball_and_more_steps_of_it(official: Any) -> None:
    model, data, _ = official
    clean, denoised, target = 2 * data["x"] - 1, data["denoised"], data["consistency_target"]

    def divergence(eta: Tensor) -> Tensor:
        log_q = model((clean + eta).flatten(0, 1)).log_softmax(-1).view(4, 12, 5)
        return (target * (target.log() - log_q)).sum(-1)

    eta_0 = denoised - clean
    found = [eta_0]
    for radius in (0.05, 0.25):
        eta = adversarial_residuals(model, clean, denoised, target, radius=radius, steps=4, renormalise=False)
        distance = (eta - eta_0).flatten(2).norm(dim=2)
        assert distance.max() <= radius * (1 + 1e-5)
        assert distance.max() > 0.99 * radius
        found.append(eta)
    for weaker, stronger in pairwise(divergence(eta) for eta in found):
        assert (stronger > weaker).all()


def test_renormalised_residuals_keep_their_mean(official: Any) -> None:
    model, data, _ = official
    clean, denoised, target = 2 * data["x"] - 1, data["denoised"], data["consistency_target"]
    eta = adversarial_residuals(model, clean, denoised, target, radius=2.0, steps=2, renormalise=True)
    mean = (-3, -2, -1)
    torch.testing.assert_close(eta.mean(mean), (denoised - clean).mean(mean), atol=1e-6, rtol=1e-5)
    plain = adversarial_residuals(model, clean, denoised, target, radius=2.0, steps=2, renormalise=False)
    assert ((plain - eta).abs().amax(mean) > 1e-4).all()


def test_attack_leaves_the_classifier_as_it_was(official: Any) -> None:
    model, data, _ = official
    dropout = nn.Dropout(0.5)
    whole = nn.Sequential(model, dropout).train()
    dropout.eval()
    model.conv.bias.requires_grad_(False)
    eta = adversarial_residuals(
        whole,
        data["x"],
        data["denoised"],
        data["consistency_target"],
        radius=0.25,
        steps=1,
        renormalise=False,
    )
    assert not eta.requires_grad
    assert [part.training for part in (whole, model, model.conv, dropout)] == [True, True, True, False]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv.bias"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attack_ignores_dropout_but_the_loss_trains_with_it(official: Any) -> None:
    model, data, _ = official
    dropping = nn.Sequential(model, nn.Dropout(0.5)).train()
    arguments = (data["x"], data["denoised"], data["consistency_target"])
    settings: dict[str, Any] = {"radius": 0.25, "steps": 2, "renormalise": True}
    torch.manual_seed(0)
    attacked = adversarial_residuals(dropping, *arguments, **settings)
    assert torch.equal(attacked, adversarial_residuals(model, *arguments, **settings))
    assert loss_on_golden(dropping, data).total.item() != loss_on_golden(dropping, data).total.item()


@pytest.mark.parametrize("renormalise", [True, False])
def test_no_residual_is_finite(official: Any, renormalise: bool) -> None:
    """eta = 0 (a perfect denoiser): with the label as target only renormalising takes the steps back."""
    model, data, _ = official
    clean = 2 * data["x"] - 1
    labels = model(clean).argmax(-1)
    denoised = clean.expand(3, *clean.shape).contiguous()
    losses = ft_cadis_loss(model, clean, denoised, labels, renormalise=renormalise, target="label", **ATTACK)
    gradients = torch.autograd.grad(losses.total, list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert losses.mask_share.item() == 1
    cross_entropy = F.cross_entropy(model(clean), labels).item()
    assert losses.sce.item() == pytest.approx(cross_entropy, rel=1e-5)
    if renormalise:
        assert losses.madv.item() == pytest.approx(cross_entropy, rel=1e-5)
    else:
        assert losses.madv.item() > 1.1 * cross_entropy


def test_constant_classifier_with_no_residual_is_finite() -> None:
    """Neither a gradient to follow nor a residual to renormalise: 0 / 0 twice."""
    model = Linear()
    nn.init.zeros_(model.gain)
    clean = torch.zeros(2, 1, 1, 3)
    losses = ft_cadis_loss(model, clean, clean[None], torch.zeros(2, dtype=torch.long), **ATTACK)
    assert losses.total.item() == pytest.approx(math.log(3))
    assert losses.madv.item() == pytest.approx(0, abs=1e-7)
    assert torch.autograd.grad(losses.total, model.gain)[0].isfinite()


def test_all_wrong_batch() -> None:
    denoised = says([WRONG, WORSE], [WORSE, WORSE])
    losses = closed_form(denoised, attack_steps=4)
    assert losses.total.item() == pytest.approx((ce(WRONG) / 2 + ce(WORSE) / 2) / 2)
    assert losses.selected_share.item() == losses.mask_share.item() == losses.madv.item() == 0
    silent = closed_form(denoised, attack_steps=4, warm_start=False)
    assert silent.total.item() == 0
    silent.total.backward()  # still connected to every parameter: a data-parallel worker must not hang


def test_wrapped_module_is_called_once_whatever_the_mask() -> None:
    """Its forward may hold a collective operation, and the mask may be empty on one worker alone."""
    bare, calls = Linear(), []
    wrapped = nn.Sequential(bare)
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    for table in (RIGHT, WRONG):
        denoised = says([table], [table])
        labels = torch.zeros(1, dtype=torch.long)
        ft_cadis_loss(wrapped, torch.zeros_like(denoised[0]), denoised, labels, attack_classifier=bare, **ATTACK)
    assert len(calls) == 2


def test_one_noise() -> None:
    """M = 1: the image's own prediction is the target, and no gradient leads away; from the label one does."""
    for steps in (0, 4):
        losses = closed_form(says([RIGHT, WRONG]), attack_steps=steps)
        assert losses.total.item() == pytest.approx((ce(RIGHT) + ce(WRONG)) / 2, rel=1e-6)
        assert losses.madv.item() == pytest.approx(0, abs=1e-6)
    # One step of the linear model, by hand: along softmax - onehot, from the label's point of view.
    p = torch.tensor(RIGHT).softmax(-1)
    uphill = p - torch.tensor([1.0, 0, 0])
    attacked = closed_form(says([RIGHT, WRONG]), attack_steps=1, renormalise=False, target="label")
    moved = torch.tensor(RIGHT) + 0.1 * uphill / uphill.norm()
    assert attacked.madv.item() == pytest.approx(ce(moved.tolist()) / 2, rel=1e-5)


def test_no_weight_does_no_adversarial_work(official: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, _ = official
    expected = loss_on_golden(model, data)

    def forbidden(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("attacked")

    monkeypatch.setattr(loss_module, "adversarial_residuals", forbidden)
    losses = loss_on_golden(model, data, adv_weight=0.0)
    assert losses.total.item() == losses.sce.item() == expected.sce.item()
    assert losses.mask_share.item() == expected.mask_share.item() > 0
    assert losses.madv.item() == 0


def test_underflowing_probabilities_keep_the_gradient_finite() -> None:
    model = Linear()
    nn.init.constant_(model.gain, 1000.0)  # softmax of gaps above 104 underflows in float32
    denoised = says([RIGHT], [[0.8, 0.1, -1.0]])
    losses = ft_cadis_loss(model, torch.zeros_like(denoised[0]), denoised, torch.zeros(1, dtype=torch.long), **ATTACK)
    assert losses.total.isfinite()
    assert torch.autograd.grad(losses.total, model.gain)[0].isfinite()


def test_denoised_cross_entropy_is_selecting_all_without_the_adversary(official: Any) -> None:
    model, data, _ = official
    plain = denoised_ce_loss(model, data["denoised"], data["y"])
    assert plain.total.item() == pytest.approx(
        loss_on_golden(model, data, adv_weight=0.0, select="all").total.item(), rel=1e-6
    )
    by_hand = sum(F.cross_entropy(model(row), data["y"]).item() for row in data["denoised"]) / 4
    assert plain.total.item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("bad", [1.001, -1.001, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["clean", "denoised"])
def test_images_out_of_range_are_refused(official: Any, place: str, bad: float) -> None:
    model, data, _ = official
    images = {"clean": 2 * data["x"] - 1, "denoised": data["denoised"].clone()}
    images[place].view(-1)[7] = bad
    with pytest.raises(DataError, match=rf"^{place}: .*\[-1, 1\]"):
        ft_cadis_loss(model, images["clean"], images["denoised"], data["y"], **ATTACK)


def test_shapes_that_do_not_fit_are_refused(official: Any) -> None:
    model, data, _ = official
    clean, denoised, labels = 2 * data["x"] - 1, data["denoised"], data["y"]
    for arguments in (
        (clean[:5], denoised, labels),
        (clean, denoised, labels[:5]),
        (clean, denoised[0], labels),
        (clean, denoised[:0], labels),
        (clean, denoised.double(), labels),
    ):
        with pytest.raises(ValueError, match=r"denoised"):
            ft_cadis_loss(model, *arguments, **ATTACK)
