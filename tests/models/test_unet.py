import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cadis_ray.errors import UsageError
from cadis_ray.models.denoisers.architecture import architecture
from cadis_ray.models.denoisers.layers import AttentionBlock, Norm, timestep_embedding
from cadis_ray.models.denoisers.unet import UNet
from tests.helpers.places import GOLDEN, SHARED

SHARED = SHARED / "golden"
TINY = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "4"}


def tiny(seed=0, **config):
    """A UNet no parameter of which is zero: the programs' own initialisation would hide half of it."""
    torch.manual_seed(seed)
    unet = UNet(architecture("guided_diffusion", TINY | config)).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2 / max(1, parameter[0].numel()) ** 0.5)
    for module in unet.modules():
        if isinstance(module, Norm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return unet


@pytest.mark.parametrize(("program", "parameters"), [("improved", 52_546_438), ("guided", 552_814_086)])
@pytest.mark.parametrize("released", [True, False])
def test_keys_and_shapes_are_those_of_the_released_model(program, parameters, released):
    manifest = json.loads((GOLDEN / f"{program}_manifest.json").read_text())
    with torch.device("meta"):
        unet = UNet(architecture(f"{program}_diffusion", None if released else manifest["config"]))
    assert {key: list(value.shape) for key, value in unet.state_dict().items()} == manifest["state_dict"]
    assert sum(p.numel() for p in unet.parameters()) == parameters == manifest["parameters"]


@pytest.mark.parametrize("program", ["improved", "guided"])
def test_output_is_that_of_the_authors_network(program):
    if not SHARED.exists():
        pytest.skip("golden weights are not here")
    config = json.loads((SHARED / f"{program}_small.config.json").read_text())
    unet = UNet(architecture(f"{program}_diffusion", config)).eval()
    unet.load_state_dict(load_file(SHARED / f"{program}_small.weights.safetensors"))
    io = load_file(SHARED / f"{program}_small.io.safetensors")
    with torch.no_grad():  # recorded by calling the network with t itself, without the program's rescaling
        assert (unet(io["x_t"], io["t"]) - io["unet_out"]).abs().max() <= 1e-4


OPTIONS = [
    {},
    {"attention_resolutions": "8,4", "num_heads": 2, "num_heads_upsample": 1},
    {"attention_resolutions": "", "channel_mult": "1,1,2"},
    {"num_head_channels": 16, "use_new_attention_order": True},
    {"resblock_updown": True},
    {"use_scale_shift_norm": False},
    {"use_scale_shift_norm": False, "resblock_updown": True, "num_head_channels": 32},
    {"learn_sigma": True, "in_channels": 1, "dropout": 0.3},
    {"conv_resample": False, "num_res_blocks": 2},
    {"channel_mult": [0.5, 1], "num_channels": 64},
]


@pytest.mark.parametrize("config", OPTIONS)
def test_folded_timestep_gives_the_general_output(config):
    unet, channels = tiny(**config), config.get("in_channels", 3)
    x = torch.randn(3, channels, 8, 16)
    with torch.no_grad():
        general = unet(x, torch.full((3,), 123.25))
        folded = unet(x, unet.fold(torch.tensor([123.25])))
        other = unet(x, torch.full((3,), 700.0))
    assert general.shape == (3, 2 * channels if config.get("learn_sigma") else channels, 8, 16)
    assert (general - folded).abs().max() <= 2e-5 * general.abs().max()
    assert (general - other).abs().max() >= 1e-3 * general.abs().max()


def test_rows_are_independent_and_have_their_own_timestep():
    unet, x, t = tiny(), torch.randn(3, 3, 8, 8), torch.tensor([3, 400, 900])
    with torch.no_grad():
        together = unet(x, t)
        for row in range(3):
            assert (unet(x[row : row + 1], t[row : row + 1]) - together[row]).abs().max() <= 1e-5


def test_state_dict_round_trip():
    first, second, x, t = tiny(seed=0), tiny(seed=1), torch.randn(2, 3, 8, 8), torch.tensor([5, 6])
    with torch.no_grad():
        assert not torch.equal(first(x, t), second(x, t))
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(x, t), second(x, t))


def test_memory_format_of_input_and_weights_does_not_change_the_output():
    unet, x, t = tiny(), torch.randn(2, 3, 8, 8), torch.tensor([5, 6])
    with torch.no_grad():
        expected = unet(x, t)
        unet.to(memory_format=torch.channels_last)
        assert (unet(x.to(memory_format=torch.channels_last), t) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_is_softmax_attention_over_pixels(new_order):
    torch.manual_seed(0)
    block, x = AttentionBlock(64, 4, new_order), torch.randn(2, 64, 3, 5)
    torch.nn.init.normal_(block.proj_out.weight)
    qkv = block.qkv(F.group_norm(x, 32).flatten(2))
    qkv = qkv.view(2, 3, 4, 16, 15) if new_order else qkv.view(2, 4, 3, 16, 15).transpose(1, 2)
    q, k, v = qkv.unbind(1)
    weight = torch.softmax(torch.einsum("bhct,bhcs->bhts", q, k) / 4, dim=-1)
    expected = x + block.proj_out(torch.einsum("bhts,bhcs->bhct", weight, v).flatten(1, 2)).view_as(x)
    assert (block(x) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("channels", [32, 96, 256, 320])
def test_norm_is_group_norm_in_float32(channels):
    torch.manual_seed(0)
    norm, x = Norm(channels), 3 + torch.randn(4, channels, 4, 6).to(memory_format=torch.channels_last)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double())
    assert (norm(x) - expected).abs().max() <= 3e-5
    half = x.bfloat16()
    exact = F.group_norm(half.double(), 32, norm.weight.double(), norm.bias.double())
    assert norm(half).dtype == torch.bfloat16
    assert ((norm(half) - exact).abs() <= 2**-8 * exact.abs() + 3e-5).all()  # rounded once, at the end


def test_embedding_of_known_angles():
    embedded = timestep_embedding(torch.tensor([0.0, 2.0]), 5)
    expected = torch.tensor([2.0, 0.02]).double()
    assert torch.equal(embedded[0], torch.tensor([1.0, 1, 0, 0, 0]))
    assert (embedded[1] - torch.cat([expected.cos(), expected.sin(), torch.zeros(1)])).abs().max() < 1e-6


def test_gradients_are_those_of_finite_differences():
    """The activations work in place; that must not reach the gradient."""
    unet, t = tiny(resblock_updown=True), torch.tensor([5, 900])
    x, direction = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(unet(x, t).square().sum(), x)
    with torch.no_grad():
        step = 1e-2
        ends = [unet(x + sign * step * direction, t).double().square().sum() for sign in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=1e-2)


def test_compiles_to_one_graph():
    unet, x = tiny(channel_mult="1"), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        folded = unet.fold(torch.tensor([7.0]))
        assert torch.equal(compiled(x, folded), unet(x, folded))


def test_every_wrong_argument_is_named():
    with pytest.raises(UsageError) as error:
        architecture(
            "guided_diffusion", {"num_chanels": 32, "class_cond": True, "dropout": "0.1", "channel_mult": "1,x"}
        )
    for word in ("num_chanels", "class_cond", "dropout", "channel_mult", "'1,x'"):
        assert word in str(error.value)


@pytest.mark.parametrize(("config", "words"), [
    ({"image_size": 28}, "image_size 28 needs channel_mult"),
    ({"num_channels": 48}, "multiple of 32, but is 48"),
    (TINY | {"num_heads": 3}, "do not divide into heads"),
    (TINY | {"num_head_channels": 0}, "do not divide into heads"),
    ({"timestep_respacing": "250"}, "timestep_respacing"),
])  # fmt: skip
def test_impossible_arguments_are_refused(config, words):
    with pytest.raises(UsageError, match=words):
        architecture("improved_diffusion", config)


@pytest.mark.parametrize(("size", "widths"), [
    (32, (64, 128, 128, 128)), (64, (64, 128, 192, 256)), (128, (64, 64, 128, 192, 256)),
    (256, (64, 64, 128, 128, 256, 256)), (512, (32, 64, 64, 128, 128, 256, 256)),
])  # fmt: skip
def test_widths_by_image_size(size, widths):
    assert architecture("guided_diffusion", {"image_size": size, "num_channels": 64}).widths == widths


def test_the_families_differ_in_the_default_of_rescaling():
    assert architecture("improved_diffusion", {}).rescale_timesteps
    assert not architecture("guided_diffusion", {}).rescale_timesteps
    with pytest.raises(UsageError, match="improved_diffusion, guided_diffusion"):
        architecture("stable_diffusion", {})
