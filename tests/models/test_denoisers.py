import json
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cadis_ray.errors import DataError, UsageError
from cadis_ray.models.checkpoints import write_safetensors
from cadis_ray.models.denoisers.diffusion import Denoiser, Mode, load_denoiser, make_denoiser
from cadis_ray.models.denoisers.schedule import make_schedule
from tests.helpers.places import SHARED
from tests.helpers.states import same_weights

SHARED = SHARED / "golden"
DIGITS = {
    "image_size": 8,
    "in_channels": 1,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1",
    "attention_resolutions": "4",
    "noise_schedule": "cosine",
}


@pytest.fixture
def digits():
    torch.manual_seed(0)
    return randomise(load_denoiser("improved_diffusion", None, DIGITS))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, 1, 8, 8, generator=generator), torch.randn(4, 1, 8, 8, generator=generator)


def randomise(denoiser):
    """Non-zero weights everywhere: the initial ones give zero noise for every input."""
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(std=0.3 / max(1, parameter[0].numel()) ** 0.5)
    return denoiser


class Constant(nn.Module):
    """Answers ``value`` whatever the input."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, timesteps):
        return self.value


@pytest.mark.parametrize("program", ["improved", "guided"])
def test_one_shot_is_that_of_the_authors_program(program):
    if not SHARED.exists():
        pytest.skip("golden weights are not here")
    config = json.loads((SHARED / f"{program}_small.config.json").read_text())
    denoiser = load_denoiser(f"{program}_diffusion", SHARED / f"{program}_small.weights.safetensors", config)
    io = load_file(SHARED / f"{program}_small.io.safetensors")
    with torch.no_grad():
        assert (denoiser.one_shot(io["x_t"], io["t"]) - io["pred_xstart"]).abs().max() <= 1e-4
        if not config["rescale_timesteps"]:  # else unet_out was recorded without the rescaling: see test_unet
            assert (denoiser.unet(io["x_t"], io["t"]) - io["unet_out"]).abs().max() <= 1e-4
    for row, t in enumerate(io["t"].tolist()):
        sigma = denoiser.schedule.sigma_at(t)
        x_t = denoiser.add_noise((io["x"][row : row + 1] + 1) / 2, io["noise"][row : row + 1], sigma)
        assert (x_t - io["x_t"][row]).abs().max() <= 1e-5
        pred = denoiser.denoise((io["x"][row : row + 1] + 1) / 2, io["noise"][row : row + 1], sigma)
        assert (pred - io["pred_xstart"][row]).abs().max() <= 1e-4


@pytest.mark.parametrize("mode", ["diffusion", "pixel"])
@pytest.mark.parametrize("config", [{}, {"learn_sigma": True, "use_scale_shift_norm": False}, {"predict_xstart": True}])
def test_denoise_equals_the_general_path(batch, mode, config):
    images, noise = batch
    denoiser = randomise(load_denoiser("improved_diffusion", None, DIGITS | config))
    for sigma in (0.25, 1.0, 0.25):
        t = torch.full((4,), denoiser.timestep(sigma))
        with torch.no_grad():
            expected = denoiser.one_shot(denoiser.add_noise(images, noise, sigma, mode), t)
            assert (denoiser.denoise(images, noise, sigma, mode) - expected).abs().max() <= 1e-5
        assert expected.dtype == torch.float32
        assert expected.abs().max() <= 1


def test_kept_embeddings_follow_the_weights(digits, batch):
    with torch.inference_mode():
        first = digits.denoise(*batch, 0.5)
        assert torch.equal(digits.denoise(*batch, 0.5), first)
    state = {key: value * 1.5 for key, value in digits.network.state_dict().items()}
    t = torch.full((4,), digits.timestep(0.5))
    for change in (
        lambda: digits.network.load_state_dict(state),
        lambda: digits.network.time_embed[2].bias.add_(1),
        lambda: digits.to(torch.bfloat16).to(torch.float32),
    ):
        with torch.no_grad():
            change()
            second = digits.denoise(*batch, 0.5)
            assert (second - digits.one_shot(digits.add_noise(*batch, 0.5), t)).abs().max() <= 1e-5
        assert not torch.equal(first, second)
        first = second


def test_gradients_reach_images_and_trainable_weights(digits, batch):
    images, noise = batch
    with torch.inference_mode():
        digits.denoise(images, noise, 0.5)
    images = images.clone().requires_grad_(True)
    digits.denoise(images, noise, 0.5).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    digits.requires_grad_(True)
    digits.denoise(images.detach(), noise, 0.5).sum().backward()
    assert digits.network.time_embed[0].weight.grad.abs().max() > 0


def test_the_network_sees_rescaled_timesteps(digits, batch):
    x_t, t = batch[1], torch.tensor([0, 9, 500, 999])
    fast = load_denoiser("improved_diffusion", None, DIGITS | {"diffusion_steps": 4000})
    fast.load_state_dict(digits.state_dict())
    raw = load_denoiser("improved_diffusion", None, DIGITS | {"diffusion_steps": 4000, "rescale_timesteps": False})
    raw.load_state_dict(digits.state_dict())
    with torch.no_grad():
        assert torch.equal(fast.unet(x_t, 4 * t), digits.unet(x_t, t))
        assert torch.equal(raw.unet(x_t, t), digits.unet(x_t, t))
        assert not torch.equal(raw.unet(x_t, 4 * t), digits.unet(x_t, t))


def test_one_shot_with_the_true_noise_returns_the_image(batch):
    images, noise = batch
    cases: list[tuple[float, Mode]] = [(0.12, "diffusion"), (1.0, "diffusion"), (0.5, "pixel")]
    for sigma, mode in cases:
        schedule = make_schedule("cosine", 1000)
        abar = schedule.alpha_bar[schedule.timestep(sigma)]
        true = noise if mode == "diffusion" else noise * (2 * sigma * np.sqrt(abar / (1 - abar))).item()
        for output in (true, torch.cat([true, torch.full_like(true, torch.nan)], dim=1)):
            denoiser = Denoiser(Constant(output), schedule, channels=1)
            assert (denoiser.denoise(images, noise, sigma, mode) - (2 * images - 1)).abs().max() <= 5e-6


def test_predicted_x_start_is_clamped_and_its_variance_ignored(batch):
    output = torch.linspace(-2, 2, 4 * 2 * 64).view(4, 2, 8, 8)
    denoiser = Denoiser(Constant(output), make_schedule("cosine", 1000), channels=1, predict_xstart=True)
    assert torch.equal(denoiser.denoise(batch[0], batch[1], 0.5), output[:, :1].clamp(-1, 1))
    assert torch.equal(denoiser.one_shot(batch[1], torch.arange(4)), output[:, :1].clamp(-1, 1))


@pytest.mark.parametrize("sigma", [0.05, 0.25, 1.0])
def test_noise_is_exactly_sigma_in_pixel_mode_and_the_schedules_in_diffusion_mode(digits, batch, sigma):
    images, noise = batch[0].double(), batch[1].double()
    root = digits.schedule.alpha_bar[digits.timestep(sigma)] ** 0.5
    added = {
        mode: (digits.add_noise(images, noise, sigma, mode) / root + 1) / 2 - images for mode in ("diffusion", "pixel")
    }
    assert (added["pixel"] - sigma * noise).abs().max() <= 1e-12
    assert (added["diffusion"] - digits.sigma_actual(sigma) * noise).abs().max() <= 1e-12
    assert sigma <= digits.sigma_actual(sigma) <= 1.03 * sigma


def test_noise_of_the_released_schedules_is_at_most_063_percent_above_sigma():
    for name, steps in (("cosine", 4000), ("linear", 1000)):
        denoiser = Denoiser(nn.Identity(), make_schedule(name, steps))
        excess = [denoiser.sigma_actual(sigma) / sigma - 1 for sigma in (0.25, 0.5, 1.0)]
        assert 0 <= min(excess) <= max(excess) <= 0.00633


@pytest.mark.parametrize("predict_xstart", [False, True])
def test_training_loss_is_the_mean_squared_error(batch, predict_xstart):
    images, noise = batch
    output = torch.randn(4, 2, 8, 8)
    denoiser = Denoiser(Constant(output), make_schedule("cosine", 1000), channels=1, predict_xstart=predict_xstart)
    target = 2 * images - 1 if predict_xstart else noise
    expected = np.mean((output[:, :1] - target).numpy() ** 2)
    assert denoiser.training_loss(2 * images - 1, torch.arange(4), noise).item() == pytest.approx(expected, rel=1e-5)


def test_training_reduces_the_loss():
    torch.manual_seed(0)
    denoiser = make_denoiser("improved_diffusion", DIGITS)
    assert denoiser.training
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=2e-3)
    x_start, losses = torch.ones(16, 1, 8, 8), []
    for _ in range(40):
        loss = denoiser.training_loss(x_start, torch.randint(200, 1000, (16,)), torch.randn(16, 1, 8, 8))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.15)
    assert np.mean(losses[-5:]) < 0.3


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_weights_survive_a_round_trip(tmp_path, digits, name):
    state = digits.network.state_dict()
    torch.save(state, tmp_path / name) if name == "w.pt" else write_safetensors(tmp_path / name, state)
    again = load_denoiser("improved_diffusion", tmp_path / name, DIGITS)
    assert same_weights(again.network.state_dict(), state)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())


def test_weights_of_another_architecture_are_refused(tmp_path, digits):
    write_safetensors(tmp_path / "w.safetensors", digits.network.state_dict())
    with pytest.raises(DataError, match=r"of another shape: time_embed\.0\.weight \[128, 32\] instead of \[256, 64\]"):
        load_denoiser("improved_diffusion", tmp_path / "w.safetensors", DIGITS | {"num_channels": 64})
    write_safetensors(tmp_path / "p.safetensors", digits.state_dict())
    with pytest.raises(DataError, match=r"only the prefix 'network\.' differs"):
        load_denoiser("improved_diffusion", tmp_path / "p.safetensors", DIGITS)


@pytest.mark.parametrize(("change", "words"), [
    (lambda x: x - 1e-3, r"in \[0, 1\]"), (lambda x: x + 1e-3, r"in \[0, 1\]"), (lambda x: 255 * x, r"in \[0, 1\]"),
    (lambda x: torch.where(x == x.max(), torch.nan, x), "finite"), (lambda x: x[:, :, :7], "must both be"),
    (lambda x: x.repeat(1, 3, 1, 1), "must both be"),
])  # fmt: skip
def test_wrong_images_are_refused(digits, batch, change, words):
    images, noise = batch
    images = (images - images.min()) / (images.max() - images.min())
    with pytest.raises(ValueError, match=words):
        digits.denoise(change(images), noise, 0.5)


def test_other_wrong_arguments_are_refused(digits, batch):
    images, noise = batch
    with pytest.raises(ValueError, match="multiples of 2"):
        digits.denoise(images[..., :7], noise[..., :7], 0.5)
    with pytest.raises(ValueError, match=r"sigma must be in \[.*got 1000000"):
        digits.denoise(images, noise, 1e6)
    with pytest.raises(ValueError, match="diffusion or pixel"):
        digits.denoise(images, noise, 0.5, "pixels")  # type: ignore[arg-type]
    for t in (torch.tensor([0, 1, 2, -1]), torch.tensor([0, 1, 2, 1000]), torch.rand(4)):
        with pytest.raises(ValueError, match=r"integers in \[0, 999\]"):
            digits.unet(noise, t)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    pytest.importorskip("diffusers", reason="the extra diffusers is not installed")
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).save_pretrained(folder / "unet")  # fmt: skip
    DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


def test_diffusers_pipeline_denoises_as_its_scheduler_does(pipeline, batch):
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    denoiser = load_denoiser("diffusers", pipeline)
    assert [denoiser.timestep(sigma) for sigma in (0.25, 0.5, 1.0)] == [145, 259, 396]
    images, noise = batch
    scheduler = cast(Any, DDPMScheduler.from_pretrained(pipeline / "scheduler"))
    model = cast(Any, UNet2DModel.from_pretrained(pipeline / "unet"))
    t = torch.tensor(145)
    x_t = scheduler.add_noise(2 * images - 1, noise, t[None])
    with torch.no_grad():
        expected = scheduler.step(model(x_t, t).sample, 145, x_t).pred_original_sample
        assert (denoiser.denoise(images, noise, 0.25) - expected).abs().max() <= 1e-5


def test_diffusers_refuses_other_folders_and_weights(pipeline, tmp_path):
    with pytest.raises(DataError, match="not a UNet2DModel pipeline"):
        load_denoiser("diffusers", tmp_path)
    with pytest.raises(UsageError, match="folder"):
        load_denoiser("diffusers")
    unet = tmp_path / "unet"
    for source in pipeline.rglob("*.json"):
        (tmp_path / source.parent.name).mkdir(exist_ok=True)
        (tmp_path / source.parent.name / source.name).write_text(source.read_text())
    weights = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    weights.pop("conv_out.bias")
    save_file(weights, unet / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"conv_out\.bias"):
        load_denoiser("diffusers", tmp_path)
