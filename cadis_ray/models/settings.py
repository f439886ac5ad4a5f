"""Sections of the study file that say which networks a trial is made of."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from cadis_ray.interface.section import A_LIST, Count, NonNegative, Positive, Section, without_password


class Denoiser(Section):
    """A diffusion denoiser. ``checkpoint``: a path, or ``package:FILE`` for one that ships with it; of the family
    diffusers, a pipeline's folder, without ``config``. ``noise``: where its noise is exactly sigma, see
    ``models.denoisers.diffusion.Denoiser.add_noise``."""

    family: Literal["improved_diffusion", "guided_diffusion", "diffusers"]
    checkpoint: str
    config: dict[str, Any] | None = None
    noise: Literal["diffusion", "pixel"] = "diffusion"


class Classifier(Section):
    """The off-the-shelf classifier: the arguments of ``models.classifiers.load_classifier``.

    ``name``: the library's name of the model, or ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``, which bring their
    weights. ``config``: keyword arguments of the library's constructor. ``prefix``: what to take from every key of
    the checkpoint. Nothing is downloaded unless ``download``.
    """

    library: Literal["timm", "transformers", "resnet"]
    name: str
    checkpoint: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    normalise: Literal["own", "half"] = "own"
    prefix: str = ""
    download: bool = False


class Lora(Section):
    """Low-rank adapters, as in peft; ``lora_alpha`` None means lora_alpha = r."""

    r: Count = 4
    lora_alpha: Positive | None = None
    target_modules: Annotated[tuple[str, ...], A_LIST, Field(min_length=1)] = ("q", "v")


Kind = Literal["denoise_then_classify", "classify", "local_smoothing", "black_box"]


class BaseClassifier(Section):
    """The base classifier of the smoothed one: how x + noise becomes a vote.

    ``kind`` None: ``denoise_then_classify``, or ``classify`` (no denoiser) where the recipe trains on noisy images.
    ``black_box``: the model behind ``black_box.endpoint`` answers; that of the recipe black_box_prompt, and off the
    shelf of the recipe none.
    ``local_smoothing`` (DiffSmooth): ``local_noises`` m of std ``local_sigma`` on [0, 1] pixels are added to the
    denoised image, the mean softmax votes once; the m noises are the same for every image, addressed by
    ``local_seed``. A certificate is for the outer ``sigma`` whatever the kind.
    """

    kind: Kind | None = None
    local_noises: Count = 5
    local_sigma: NonNegative = 0.25
    local_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Prompt(Section):
    """Deep visual prompts: ``tokens`` at each block."""

    tokens: Count = 100


class Series(Section):
    """Series adapters after attention and MLP of each block, ``bottleneck`` wide."""

    bottleneck: Count = 64


class Coordinator(Section):
    """What ``black_box_prompt`` trains, by SPSA with gradient correction.

    The configuration's ``classifier``, frozen, encodes x + noise; its features and a vector of ``trigger`` numbers
    become a pixel prompt of at most ``strength`` on the [-1, 1] scale, by a decoder ``hidden`` channels wide. Gains at
    step k: ``a`` / (k + 1)^0.4 and ``c`` / k^0.1; a step asks for 2 * ``averages`` answers to its batch.
    """

    trigger: Count = 8
    hidden: Count = 8
    strength: Positive = 1.0
    a: Positive = 0.01
    c: Positive = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    averages: Count = 5


class BlackBox(Section):
    """A model that is a function from images to logits or labels, and who may ask how often; what is retried and what
    refused: ``models.black_box.BlackBox``.

    ``endpoint``: ``module:function`` or ``http(s)://...``; ``classes``: of its answers. ``version``: any text; change
    it whenever the model behind the endpoint changes, since votes are kept under it. ``timeout`` in seconds, ``rate``
    and ``budget`` in images, a second and altogether, of one process.
    """

    endpoint: str | None = None
    classes: Count | None = None
    version: str = ""
    timeout: Positive = 30.0
    retries: Annotated[int, Field(ge=0)] = 3
    rate: Positive | None = None
    budget: Count | None = None
    batch_size: Count = 256

    @field_validator("endpoint")
    @classmethod
    def _without_password(cls, endpoint: str | None) -> str | None:
        return without_password(endpoint, "to the service by its environment")
