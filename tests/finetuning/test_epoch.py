"""One epoch: what it reports, that it repeats bit for bit, that it stops, and that it shares out work."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cadis_ray.finetuning.batch import Batch, NonFiniteLoss
from cadis_ray.finetuning.epoch import train_epoch
from cadis_ray.finetuning.optimiser import make_optimiser
from cadis_ray.finetuning.recipes.ft_cadis import ft_cadis_loss
from cadis_ray.finetuning.settings import FineTuning
from cadis_ray.finetuning.trial import votes_on
from cadis_ray.models.adapters.lora import add_lora, merge_lora, trainable_parameters
from cadis_ray.models.classifiers.classifier import Classifier

SETTINGS = FineTuning(base_lr=5e-2, batch_size=12, epochs=4, warmup_epochs=1.0, attack_radius=0.1, attack_steps=2)


def vit(dropped: float = 0.0) -> Classifier:
    torch.manual_seed(0)
    backbone = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        in_chans=1,
        num_classes=3,
        embed_dim=24,
        depth=2,
        num_heads=2,
        drop_path_rate=dropped,
    )
    return Classifier(backbone, image_size=(8, 8))


def batches(model: nn.Module, count: int = 3, size: int = 12, noises: int = 2) -> list[Batch]:
    """Images whose labels the untrained model mostly hits, so that selection and mask both have work."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        clean = torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1
        noise = 0.3 * torch.randn(noises, size, 1, 8, 8, generator=generator)
        with torch.no_grad():
            labels = model(clean).argmax(-1)
        labels[: size // 4] = (labels[: size // 4] + 1) % 3
        made.append(Batch(clean, (clean + noise).clamp(-1, 1), labels))
    return made


def train(model: nn.Module, data: list[Batch], settings: FineTuning = SETTINGS, **options: Any) -> dict[str, float]:
    place: dict[str, Any] = {"epoch": 1, "first_step": 3, "total_steps": 12}
    return train_epoch(model, make_optimiser(model, settings), [[batch] for batch in data], settings, **place | options)


def test_training_repeats_bit_for_bit_and_reports_the_means_over_images() -> None:
    base = vit(dropped=0.2)
    data = [*batches(base), *batches(base, count=1, size=4)]
    states, reports = [], []
    for _ in range(2):
        model = add_lora(base, r=2, lora_alpha=None, target_modules=("q", "v"), seed=7)
        torch.manual_seed(3)
        reports.append(train(model, data))
        states.append(model.state_dict())
    assert reports[0] == reports[1]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    report = reports[0]
    assert report["images"] == 40
    assert 0 < report["mask_share"] <= report["selected_share"] < 1
    assert report["loss"] == pytest.approx(report["sce"] + SETTINGS.adv_weight * report["madv"], rel=1e-5)


def test_report_weighs_batches_by_their_images() -> None:
    """With a rate of 0 every batch sees the same weights."""
    model = vit()
    data = [*batches(model), *batches(model, count=1, size=4)]
    still = SETTINGS.model_copy(update={"base_lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0, "weight_decay_end": 0.0})
    report = train(model, data, still)
    settings: dict[str, Any] = {"adv_weight": 1.0, "attack_radius": 0.1, "attack_steps": 2}
    losses = [ft_cadis_loss(model, b.clean, b.denoised, b.labels, **settings).total.item() for b in data]
    expected = (12 * sum(losses[:3]) + 4 * losses[3]) / 40
    assert report["loss"] == pytest.approx(expected, rel=1e-5)


def test_training_lowers_the_loss_and_leaves_the_frozen_weights() -> None:
    base = vit()
    model = add_lora(base, r=2, lora_alpha=None, target_modules=("q", "v"), seed=0)
    data = batches(base, count=1) * 10
    for recipe in ("ft_cadis", "denoised_ce"):
        settings = SETTINGS.model_copy(update={"recipe": recipe})
        before = {name: p.clone() for name, p in model.named_parameters()}
        first = train(model, data[:1], settings)["loss"]
        train(model, data, settings)
        assert train(model, data[:1], settings)["loss"] < 0.95 * first
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def test_workers_and_parts_make_the_global_batch() -> None:
    """Two workers' shares of 9 and 3 images, or one's parts of 5 and 7, move the weights as the whole batch of 12."""
    (batch,) = batches(vit(), count=1)
    settings = SETTINGS.model_copy(update={"clip_norm": 1e9})

    def displacement(*parts: Batch) -> Tensor:
        model = vit()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        groups = [{"params": list(model.parameters()), "lr_scale": 1.0, "decays": False}]
        train_epoch(model, torch.optim.SGD(groups, lr=0.0), [parts], settings, epoch=1, first_step=3, total_steps=12)
        return nn.utils.parameters_to_vector(model.parameters()).detach() - before

    def part(start: int, end: int, workers: int) -> Batch:
        rows = slice(start, end)
        scale = (end - start) * workers / 12
        return Batch(batch.clean[rows], batch.denoised[:, rows], batch.labels[rows], scale=scale)

    whole = displacement(batch)
    averaged = (displacement(part(0, 9, 2)) + displacement(part(9, 12, 2))) / 2
    torch.testing.assert_close(averaged, whole, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(displacement(part(0, 5, 1), part(5, 12, 1)), whole, atol=1e-6, rtol=1e-4)


def test_wrapped_for_data_parallelism_trains_the_same(tmp_path: Path) -> None:
    data = batches(vit())
    alone = vit()
    report = train(alone, data)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        bare = vit()
        wrapped = DistributedDataParallel(bare)
        assert train(wrapped, data, bare=bare) == pytest.approx(report, rel=1e-5)
    finally:
        dist.destroy_process_group()
    for ours, theirs in zip(bare.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_attack_radius_doubles_after_the_given_epoch() -> None:
    settings = SETTINGS.model_copy(update={"attack_radius_doubles_after": 2, "mask": "none"})
    data = batches(vit(), count=1)
    madv = {epoch: train(vit(), data, settings, epoch=epoch)["madv"] for epoch in (1, 2)}
    doubled = SETTINGS.model_copy(update={"attack_radius": 0.2, "mask": "none"})
    assert train(vit(), data, doubled)["madv"] == madv[2] > madv[1]


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_stops_at_the_first_step_that_is_not_finite(how: str) -> None:
    base = vit()
    data = batches(base)
    model = vit()
    calls = 0

    def poison(_module: nn.Module, _inputs: Any, logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls < 2:
            return logits
        if how == "loss":
            return logits * math.nan
        logits.register_hook(lambda gradient: gradient * math.inf)
        return logits

    settings = SETTINGS.model_copy(update={"recipe": "denoised_ce"})
    expected = vit()
    train(expected, data[:1], settings)
    model.register_forward_hook(poison)
    with pytest.raises(NonFiniteLoss, match="epoch 1, step 4") as caught:
        train(model, data, settings)
    assert calls == 2
    assert (caught.value.epoch, caught.value.step) == (1, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    sent = pickle.loads(pickle.dumps(caught.value))
    assert (sent.epoch, sent.step, str(sent)) == (1, 4, str(caught.value))


def test_bf16_forward_with_float32_losses_and_weights() -> None:
    data = batches(vit())
    model = vit()
    seen = []
    model.backbone.get_submodule("head").register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    report = train(model, data, SETTINGS.model_copy(update={"precision": "bf16"}))
    exact = train(vit(), data)
    assert set(seen) == {torch.bfloat16}
    assert report["loss"] != exact["loss"]
    assert report["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_frozen_selection_needs_its_classifier() -> None:
    base = vit()
    data = batches(base, count=1)
    frozen = SETTINGS.model_copy(update={"update_selection": "frozen"})
    with pytest.raises(ValueError, match="selection_classifier"):
        train(vit(), data, frozen)
    with pytest.raises(ValueError, match="selection_classifier"):
        train(vit(), data, selection_classifier=base)
    with pytest.raises(ValueError, match="no batches"):
        train(vit(), [])
    model = vit()
    with torch.no_grad():
        for parameter in model.backbone.get_submodule("head").parameters():
            parameter.neg_()  # prefers the class that the base likes least
    judging_itself = train(copy.deepcopy(model), data)["mask_share"]
    judged = train(model, data, frozen, selection_classifier=base)["mask_share"]
    assert judged == train(vit(), data)["mask_share"] != judging_itself


def test_votes_count_every_image_once_whatever_the_batch() -> None:
    model = vit().train()
    denoised = torch.rand(5, 7, 1, 8, 8).half() * 2 - 1
    denoised[2, 3] = math.nan
    expected = torch.zeros(7, 4, dtype=torch.int64)
    model.eval()
    with torch.no_grad():
        for sample in range(5):
            for image in range(7):
                logits = model(denoised[sample, image][None].float())[0]
                expected[image, 3 if logits.isnan().any() else logits.argmax()] += 1
    model.train()
    for batch_size in (1, 4, 100):
        assert torch.equal(votes_on(model, denoised, batch_size=batch_size), expected)
    assert model.training
    assert expected[3, 3] == 1


def test_one_step_of_vit_base_with_lora() -> None:
    """ViT-B/16 (on 64x64 images, for speed), rank 4, batch 2, M = 2; then merged and unmerged agree."""
    torch.manual_seed(0)
    backbone = timm.create_model("vit_base_patch16_224", num_classes=10, img_size=64)
    model = add_lora(Classifier(backbone, image_size=(64, 64)), r=4, lora_alpha=None, target_modules=("q", "v"), seed=0)
    del backbone
    assert trainable_parameters(model) == 147_456 + 7_690
    clean = torch.rand(2, 3, 64, 64) * 2 - 1
    batch = Batch(clean, (clean + 0.1 * torch.randn(2, *clean.shape)).clamp(-1, 1), torch.tensor([3, 4]))
    settings = SETTINGS.model_copy(update={"attack_steps": 1, "mask": "none", "num_noises": 2, "batch_size": 2})
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    report = train(model, [batch], settings)
    assert math.isfinite(report["loss"])
    assert report["madv"] > 0
    moved = [name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])]
    assert {name for name in before if "lora_B" in name or "head" in name} <= set(moved)
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(merge_lora(model)(clean), model(clean), atol=1e-5, rtol=0)
