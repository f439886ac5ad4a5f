"""Constructor arguments of OpenAI's two diffusion programs, typed and checked. Imports no torch, for dry runs."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cadis_ray.errors import UsageError

GROUPS = 32  # of every group norm in both programs

CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


def _numbers(value: Any) -> Any:
    """Both programs write lists as text with commas: "16,8"."""
    if isinstance(value, str):
        return tuple(float(part) for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


Numbers = Annotated[tuple[float, ...], BeforeValidator(_numbers)]
Count = Annotated[int, Field(ge=1)]


class Architecture(BaseModel):
    """Arguments of ``create_model_and_diffusion`` under the programs' names, with their defaults.

    Beyond the programs: ``in_channels``, ``conv_resample``, and in both families ``channel_mult`` for any image size
    (empty: the programs' own table by ``image_size``). Arguments that change sampling or memory, never the network's
    output at a timestep, are accepted and ignored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    image_size: Count = 64
    in_channels: Count = 3
    num_channels: Count = 128
    num_res_blocks: Count = 2
    num_heads: Count = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    attention_resolutions: Numbers = (16, 8)
    channel_mult: Numbers = ()
    conv_resample: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    learn_sigma: bool = False
    diffusion_steps: Annotated[int, Field(ge=2)] = 1000
    noise_schedule: Literal["linear", "cosine"] = "linear"
    rescale_timesteps: bool = False
    predict_xstart: bool = False

    class_cond: Literal[False] = False
    timestep_respacing: Literal[""] = ""
    sigma_small: bool = False
    use_checkpoint: bool = False
    use_fp16: bool = False
    use_kl: bool = False
    rescale_learned_sigmas: bool = False

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if not self.channel_mult and self.image_size not in CHANNEL_MULT:
            raise ValueError(f"image_size {self.image_size} needs channel_mult, for example '1,2'; "
                             f"only {', '.join(map(str, sorted(CHANNEL_MULT)))} have a default")  # fmt: skip
        for width in self.widths:
            if width < 1 or width % GROUPS:
                raise ValueError(f"num_channels * channel_mult must be a multiple of {GROUPS}, but is {width}")
        if self.noise_schedule == "linear" and self.diffusion_steps <= 20:
            raise ValueError(f"the linear schedule needs diffusion_steps above 20, but got {self.diffusion_steps}")
        if any(resolution < 1 or resolution % 1 for resolution in self.attention_resolutions):
            raise ValueError(f"attention_resolutions must be integers from 1, got {self.attention_resolutions}")
        halvings = [2**level for level in range(len(self.widths))]
        attending = {w for w, ds in zip(self.widths, halvings, strict=True) if ds in self.attention_ds}
        for width in {*attending, self.widths[-1]}:
            for heads in {self.heads(width), self.heads(width, upsample=True)}:
                if heads < 1 or width % heads:
                    raise ValueError(f"the attention's {width} channels do not divide into heads (num_heads, "
                                     "num_heads_upsample, num_head_channels)")  # fmt: skip
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, from the full resolution down."""
        return tuple(int(m * self.num_channels) for m in self.channel_mult or CHANNEL_MULT[self.image_size])

    @property
    def attention_ds(self) -> frozenset[int]:
        """Downsampling factors at which it attends; a resolution it never has is ignored, as in the programs."""
        return frozenset(self.image_size // int(resolution) for resolution in self.attention_resolutions)

    def heads(self, width: int, upsample: bool = False) -> int:
        """Heads of an attention over ``width`` channels, on the way down or up; 0 where they do not divide."""
        if self.num_head_channels != -1:
            return width // self.num_head_channels if width % (self.num_head_channels or width + 1) == 0 else 0
        return self.num_heads_upsample if upsample and self.num_heads_upsample != -1 else self.num_heads


def architecture(family: str, config: dict[str, Any] | None = None) -> Architecture:
    """The checked arguments of ``config``; None: those of the released CIFAR-10 or ImageNet 256x256 model.

    Raises UsageError listing every wrong argument.
    """
    if family not in RELEASED:
        raise UsageError(f"denoiser.family must be one of {', '.join(RELEASED)}, but got {family!r}")
    defaults = {"rescale_timesteps": family == "improved_diffusion"}
    try:
        return Architecture.model_validate(defaults | (RELEASED[family] if config is None else config))
    except ValidationError as error:
        lines = [f"denoiser.config of {family}:"]
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"]))
            lines.append(f"  {name}: {problem['msg']}, but got {problem['input']!r}" if name else f"  {problem['msg']}")
        raise UsageError("\n".join(lines)) from None


RELEASED: dict[str, dict[str, Any]] = {
    "improved_diffusion": {  # cifar10_uncond_50M_500K.pt
        "image_size": 32,
        "num_channels": 128,
        "num_res_blocks": 3,
        "dropout": 0.3,
        "learn_sigma": True,
        "diffusion_steps": 4000,
        "noise_schedule": "cosine",
    },
    "guided_diffusion": {  # 256x256_diffusion_uncond.pt
        "image_size": 256,
        "num_channels": 256,
        "num_head_channels": 64,
        "attention_resolutions": "32,16,8",
        "resblock_updown": True,
        "learn_sigma": True,
    },
}
