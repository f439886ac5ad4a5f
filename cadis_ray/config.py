"""The study file, typed: what stands where, with which bounds, and how a file becomes a ``Study``.

Rules between fields are in ``rules``, where they apply in ``checks``, the words of messages in ``explain``.
None of these imports torch, ray or mlflow, nor NumPy and SciPy before a file is checked: ``--help`` and
``--dry-run`` depend on it.
"""

import hashlib
import json
import os.path
from collections.abc import Callable, Mapping
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from cadis_ray import rules, strict_yaml
from cadis_ray.errors import UsageError
from cadis_ray.explain import Schema, dotted, findings, got, section, with_value
from cadis_ray.files import digest

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9_-]*$")]
Value = bool | int | float | str | None
A_LIST = Field(strict=False)  # YAML has lists only; strict pydantic refuses them for tuples
# Keys whose values are files or folders, of a section or as a dotted path; of the names only those so marked.
PLACES = {"checkpoint": "", "classifier.checkpoint": "", "name": rules.LOCAL, "classifier.name": rules.LOCAL}


class Section(BaseModel):
    """A section of the study file: unknown keys, text for numbers, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    """Where images come from and how many of each split are used.

    ``path``: the data set's folder or its URI (s3://, gs://); digits has none. ``validation`` images are a seeded
    slice of the training images; ``train`` of the rest are trained on, None: all. ``test`` images are the data set's
    own, chosen by ``test_subset``: ``first`` of a seeded order, ``per_class`` the same number of each, ``every`` k-th.
    ``image_size``: to resize and crop the test images of image_folder and parquet to; None: as they are.
    """

    name: Literal["digits", "cifar10", "image_folder", "parquet"]
    path: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    train: Count | None = None
    validation: Count = 400
    test: Count = 400
    test_subset: Literal["first", "per_class", "every"] = "first"
    augmentation: Literal["none", "cifar10", "imagenet"] = "none"
    image_size: Count | None = None

    @field_validator("path")
    @classmethod
    def _without_password(cls, path: str | None) -> str | None:
        if "://" in (path or "") and urlsplit(path).password is not None:
            raise ValueError("holds a password; give it to the storage by its environment variables")
        return path


class Denoiser(Section):
    """A diffusion denoiser. ``checkpoint``: a path, or ``package:FILE`` for one that ships with it; of the family
    diffusers, a pipeline's folder, without ``config``. ``noise``: where its noise is exactly sigma, see
    ``models.denoisers.Denoiser.add_noise``."""

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
    config: dict[str, Any] = {}
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


NOISY = ("gaussian", "smoothadv", "peft_smoothing", "black_box_prompt")  # recipes that train on x + noise


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
        if "://" in (endpoint or "") and urlsplit(endpoint).password is not None:
            raise ValueError("holds a password; give it to the service by its environment")
        return endpoint


class FineTuning(Section):
    """How a trial fine-tunes. The ablation switches carry the names of the papers' tables.

    ``recipe`` ft_cadis and denoised_ce train on denoised images; gaussian (Cohen et al. 2019), smoothadv (Salman et
    al. 2019), peft_smoothing and black_box_prompt (PEFTSmoothing) on x + noise, whose std is ``noise_sigma`` (None:
    sigma). ``adapter`` says what trains, with the head, whatever the recipe, but for black_box_prompt.
    ``attack_radius`` is l2 on the [-1, 1] scale for every recipe, twice a radius on [0, 1] pixels; smoothadv reaches
    it after ``attack_warmup_epochs``.
    ``batch_size``: of a step, over all workers and ``accumulation`` parts. ``stop_after``: epochs to take of a
    schedule of ``epochs``, None: all.
    """

    recipe: Literal[
        "ft_cadis", "denoised_ce", "none", "gaussian", "smoothadv", "peft_smoothing", "black_box_prompt"
    ] = "ft_cadis"
    adapter: Literal["lora", "full", "prompt", "series"] = "lora"
    lora: Lora = Lora()
    prompt: Prompt = Prompt()
    series: Series = Series()
    coordinator: Coordinator = Coordinator()
    adv_weight: NonNegative = 1.0
    attack_radius: NonNegative = 0.25
    attack_steps: Annotated[int, Field(ge=0)] = 4
    num_noises: Count = 4
    renormalise: bool = True
    warm_start: bool = True
    detach_target: bool = False
    select: Literal["non_hallucinated", "all", "confidence"] = "non_hallucinated"
    confidence: Annotated[float, Field(ge=0, le=1)] = 0.5
    update_selection: Literal["every_step", "frozen"] = "every_step"
    mask: Literal["all_correct", "none"] = "all_correct"
    target: Literal["consistency", "label"] = "consistency"
    reduction: Literal["max", "mean"] = "max"
    epochs: Count = 10
    stop_after: Count | None = None
    batch_size: Count = 128
    accumulation: Count = 1
    base_lr: Positive = 5e-4
    min_lr: NonNegative = 1e-6
    warmup_epochs: NonNegative = 1.0
    weight_decay: NonNegative = 0.04
    weight_decay_end: NonNegative = 0.4
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65
    clip: Literal["per_tensor", "global"] = "per_tensor"
    clip_norm: Positive = 1.0
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["float32", "bf16"] = "float32"
    attack_radius_doubles_after: Count | None = None
    attack_warmup_epochs: Annotated[int, Field(ge=0)] = 10
    noise_sigma: Positive | None = None

    @property
    def last_epoch(self) -> int:
        """How many epochs a trial takes; 0 where nothing is trained."""
        return 0 if self.recipe == "none" else min(self.epochs, self.stop_after or self.epochs)


def _samples(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    allowed = "a number of samples, or a growing list of them such as [32, 128, 512]"
    try:
        found = validate(value)
    except ValidationError:  # else one message for each kind
        raise ValueError(f"got {got(value)}; need {allowed}") from None
    if any(later <= earlier for earlier, later in pairwise(schedule(found))):
        raise ValueError(f"got {value}; need {allowed}")
    return found


Samples = Annotated[Count | Annotated[tuple[Count, ...], A_LIST, Field(min_length=1)], WrapValidator(_samples)]


def schedule(samples: int | tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of samples an image can have, the first for all; see ``smoothing.estimate.next_samples``."""
    return samples if isinstance(samples, tuple) else (samples,)


class Validation(Section):
    """What a trial counts after each epoch: label-aware, few samples, many images. Never a certificate.

    ``samples``: of every image, or a growing list: an image goes on to the next number while at most two of its
    samples missed the label.
    """

    images: Count = 400
    samples: Samples = 64


class Finalists(Section):
    """After the search its best ``count`` trials are counted again, and the winner is chosen by that count alone.

    ``images``: of the validation images, None: all of them. ``samples`` as of validation, with noise of their own.
    """

    count: Annotated[int, Field(ge=1, le=3)] = 3
    images: Count | None = None
    samples: Samples = (32, 128, 512)


class Certification(Section):
    """Certificates on test images with fresh noise.

    ``mode`` protocol: CERTIFY of Cohen et al. 2019, n samples an image. sequential: at most n, fewer where ``radii``
    are settled before. estimate: a few samples an image and no certificate, not for a study. ``precision`` bf16: of
    the networks' insides; x_start, logits and argmax stay float32. It is another classifier, and has votes of its own.
    """

    mode: Literal["protocol", "sequential", "estimate"] = "protocol"
    precision: Literal["float32", "bf16"] = "float32"
    images: Count = 200
    n0: Count = 100
    n: Annotated[int, Field(ge=1, le=2**53)] = 10_000  # float64 tells every n up to there
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.001
    radii: Annotated[tuple[NonNegative, ...], A_LIST] = (0.0, 0.25, 0.5, 0.75)


class Configuration(Section):
    """Everything one trial needs."""

    data: Data
    sigma: Positive
    denoiser: Denoiser
    classifier: Classifier
    base_classifier: BaseClassifier = BaseClassifier()
    black_box: BlackBox = BlackBox()
    finetuning: FineTuning = FineTuning()
    validation: Validation = Validation()
    certification: Certification = Certification()

    @property
    def kind(self) -> Kind:
        """The kind of base classifier, which ``base_classifier.kind`` may leave to the recipe."""
        if self.finetuning.recipe == "black_box_prompt":
            return "black_box"
        noisy = self.finetuning.recipe in NOISY
        return self.base_classifier.kind or ("classify" if noisy else "denoise_then_classify")


class Distribution(Section):
    """One searched parameter: a range (``low``, ``high``, ``log``, ``integer``) or ``choices``.

    ``when``: path of another searched parameter -> the value or values for which this one is drawn; otherwise
    it keeps the base's value.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False
    choices: Annotated[tuple[Value, ...], A_LIST] | None = None
    when: dict[str, Value | Annotated[tuple[Value, ...], A_LIST]] = {}


class CertifiedAt(Section):
    """Estimated certified accuracy at one of the certification's ``radii``."""

    certified_accuracy: NonNegative


class CleanAtLeast(Section):
    """Estimated clean accuracy of at least that of the ``baseline``, minus a share of the images."""

    baseline: Name
    minus: Annotated[float, Field(ge=0, le=1)] = 0.01


Metric = Literal["acr", "clean"] | CertifiedAt


class Objective(Section):
    """What the search maximises, estimated on validation images at the certification's n and alpha.

    Two metrics: the result is their Pareto front, the winner its member with the largest first metric. A trial below
    ``clean_at_least`` never wins while another trial is not; where all are below, the one nearest to it wins.
    """

    maximise: Metric | Annotated[tuple[Metric, ...], A_LIST, Field(min_length=2, max_length=2)] = "acr"
    clean_at_least: CleanAtLeast | None = None

    @field_validator("maximise", mode="wrap")
    @classmethod
    def _in_one_message(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError as error:  # else one for each kind of metric
            allowed = "acr, clean, {certified_accuracy: RADIUS}, or a list of two of these"
            raise ValueError(f"got {got(value)}; need {allowed}") from error

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return self.maximise if isinstance(self.maximise, tuple) else (self.maximise,)


class Sampler(Section):
    """Optuna's sampler; ``startup`` trials of tpe and gp are drawn at random before the model is trusted.

    ``grid``: every combination of the choices once. ``population``: of a generation of nsga2 and cma_es.
    """

    name: Literal["tpe", "gp", "random", "grid", "nsga2", "cma_es"] = "tpe"
    startup: Annotated[int, Field(ge=0)] = 5
    population: Annotated[int, Field(ge=2)] = 16


class Scheduler(Section):
    """When a searched trial is stopped early, after ``grace_epochs`` at least, judged by the trials that ended before
    it was drawn. ``asha``: below the best 1 / ``reduction_factor`` of these after the same epoch, at rungs that grow
    by that factor. ``racing``: when its ACR, by the upper confidence bound of the paired difference, is below the best
    one's after the same epoch; early epochs are counted on fewer images."""

    name: Literal["none", "asha", "racing"] = "none"
    grace_epochs: Count = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 3


class Resources(Section):
    """What the study takes of the cluster. ``workers_per_trial`` 0: a trial trains in its own process (Ray Train's
    local mode), which on a small machine saves the start of five processes a trial. ``actors`` denoise or certify; a
    cluster with less room goes on with ``min_actors``. GPUs: a whole number, or a share of one, so that several fit
    on it. ``batch_size``: of samples in an actor, None: it finds the fastest by itself.

    ``pool``: where trials find denoised training images: Ray's object store, the run's folder, or nowhere, so that
    each trial denoises its own; of the same training. ``pool_gb``: at most so much of them is kept, the first epochs.
    """

    workers_per_trial: Annotated[int, Field(ge=0)] = 1
    cpus_per_worker: Positive = 1.0
    gpus_per_worker: NonNegative = 0.0
    concurrent_trials: Count = 2
    actors: Count = 2
    min_actors: Count = 1
    cpus_per_actor: Positive = 1.0
    gpus_per_actor: NonNegative = 0.0
    threads_per_process: Count = 1
    pool: Literal["memory", "disk", "off"] = "memory"
    pool_gb: NonNegative | None = None
    batch_size: Count | None = None


class Tracking(Section):
    """MLflow. ``uri`` None: MLFLOW_TRACKING_URI, or a SQLite file in the run's folder. ``registered_model``: whose next
    version the winner becomes."""

    uri: str | None = None
    experiment: Annotated[str, Field(min_length=1)] | None = None
    registered_model: Name | None = None

    @field_validator("uri")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        parts = urlsplit(uri or "")
        if parts.password is not None or any("password" in key.lower() for key in parse_qs(parts.query)):
            raise ValueError("holds a password; give it to MLflow by its environment variables")
        return uri


class Study(Section):
    """One study file. ``warm_start``: folders of compatible runs, whose complete trials the sampler learns from."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    trials: Count
    tolerated_failures: Annotated[int, Field(ge=0)] = 2
    base: Configuration
    space: dict[str, Distribution]
    baselines: dict[Name, dict[str, Any]] = {}
    objective: Objective = Objective()
    sampler: Sampler = Sampler()
    warm_start: Annotated[tuple[str, ...], A_LIST] = ()
    scheduler: Scheduler = Scheduler()
    finalists: Finalists = Finalists()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()


def load_study(path: str | Path) -> Study:
    """Read and check a study file.

    Checkpoints and folders become absolute paths (relative ones start at the study file's folder), and a denoiser
    that ships with the package gets its constructor arguments. Raises UsageError with a line for every problem:
    ``FILE:LINE:COLUMN: KEY.PATH: got X; need Y. Did you mean Z?``
    """
    from cadis_ray.checks import place, rule_findings, warm_start_findings  # they need this module's types

    path = Path(path)
    document = strict_yaml.parse(path)
    raw = _completed(document.data, path.resolve().parent)
    found = findings(Study, raw)
    found += rule_findings(raw, {finding.path for finding in found})
    problems = [*document.problems, *(place(finding, document.marks) for finding in found)]
    if problems:
        raise strict_yaml.usage_error(document.name, problems)
    study = Study.model_validate(raw)
    if problems := [place(finding, document.marks) for finding in warm_start_findings(study)]:
        raise strict_yaml.usage_error(document.name, problems)
    return study


def configuration(study: Study, parameters: Mapping[str, Any]) -> Configuration:
    """The base with values set at dotted paths. Raises UsageError for an unknown path or a refused value."""
    return changed(study.base, parameters)


def changed(base: Configuration, parameters: Mapping[str, Any]) -> Configuration:
    """``base`` with values set at dotted paths. Raises UsageError for an unknown path or a refused value."""
    raw = base.model_dump()
    for path, value in parameters.items():
        if problem := Schema.of(Configuration).path_problem(path):
            raise UsageError(f"{path}: {problem}")
        raw = with_value(raw, tuple(path.split(".")), value)
    if found := findings(Configuration, raw):
        raise UsageError("\n".join(f"{dotted(finding.path)}: {finding.text}" for finding in found))
    return Configuration.model_validate(raw)


def searched_paths(study: Study) -> tuple[str, ...]:
    """Dotted paths of the searched parameters, in the order of the study file."""
    return tuple(study.space)


def trial_values(study: Study, path: str) -> tuple[Any, ...]:
    """What a trial can have at a dotted path: every choice, both ends of a range, or the base's value."""
    distribution = study.space.get(path)
    base = reduce(getattr, path.split("."), study.base)
    if distribution is None:
        return (base,)
    return rules.extremes(distribution) + ((base,) if distribution.when else ())


def max_num_noises(study: Study) -> int:
    """The largest M of any trial or baseline: noises per image and epoch in the denoised pool."""
    return _maximum(study, "finetuning.num_noises")


def max_epochs(study: Study) -> int:
    """The largest number of epochs that any trial or baseline takes: epochs in the denoised pool."""
    epochs = _maximum(study, "finetuning.epochs")
    path = "finetuning.stop_after"
    stops = [*trial_values(study, path)]
    stops += [changes[path] for changes in study.baselines.values() if path in changes]
    return epochs if None in stops else min(epochs, max(stops))


def fingerprint(study: Study) -> str:
    """SHA-256 of all that changes results: the study without name, tolerated failures, tracking and resources (but for
    the concurrent trials), with the content of its checkpoints and of the runs it learns from instead of their paths.

    Raises UsageError if one of them cannot be read.
    """
    content = study.model_dump(mode="json", exclude={"name", "tolerated_failures", "resources", "tracking"})
    if study.warm_start:
        from cadis_ray.warm_start import warm_digest

        content["warm_start"] = [warm_digest(Path(folder)) for folder in study.warm_start]
    content["concurrent_trials"] = study.resources.concurrent_trials  # the sampler's view depends on it
    return identity(content)


def identity(content: dict[str, Any]) -> str:
    """SHA-256 of plain data that came from a study, with the content of its checkpoints instead of their paths.

    Raises UsageError if a checkpoint cannot be read.
    """
    canonical = json.dumps(_with_checkpoints(content, _digest), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _maximum(study: Study, path: str) -> int:
    base = reduce(getattr, path.split("."), study.base)
    return max(*trial_values(study, path), *(changes.get(path, base) for changes in study.baselines.values()), 1)


def _completed(raw: Any, folder: Path) -> Any:
    """The study with what its file leaves out: the checkpoints' folder, the config of a shipped denoiser."""

    def absolute(checkpoint: str) -> str:
        if checkpoint.startswith(rules.PACKAGE):
            return checkpoint
        local = rules.LOCAL if checkpoint.startswith(rules.LOCAL) else ""
        return local + os.path.normpath(folder / checkpoint.removeprefix(local))

    raw = _with_checkpoints(raw, absolute)
    data = section(section(raw, "base"), "data")
    if isinstance(path := data.get("path"), str) and "://" not in path:
        data["path"] = os.path.normpath(folder / path)
    denoiser = section(section(raw, "base"), "denoiser")
    if isinstance(checkpoint := denoiser.get("checkpoint"), str) and denoiser.get("config") is None:
        denoiser["config"] = rules.shipped_config(checkpoint)
    return raw


def _with_checkpoints(raw: Any, change: Callable[[str], str], key: str = "") -> Any:
    """A copy with ``change`` applied to each checkpoint or folder: of the base, a baseline, a choice or a condition."""
    if isinstance(raw, dict):
        return {name: _with_checkpoints(value, change, key if name == "choices" else name)
                for name, value in raw.items()}  # fmt: skip
    if isinstance(raw, list):
        return [_with_checkpoints(item, change, key) for item in raw]
    return change(raw) if isinstance(raw, str) and key in PLACES and raw.startswith(PLACES[key]) else raw


def _digest(checkpoint: str) -> str:
    try:
        return digest(rules.checkpoint_file(checkpoint))
    except OSError as error:
        raise UsageError(f"{checkpoint}: cannot be read: {error.strerror}") from None
