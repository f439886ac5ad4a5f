"""Sections of the study file that say how the search goes on, and on which machines."""

from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from cadis_ray.interface.section import A_LIST, Count, Name, NonNegative, Positive, Section, Value, got


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
    when: dict[str, Value | Annotated[tuple[Value, ...], A_LIST]] = Field(default_factory=dict)


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
    local mode), which on a small machine saves the start of five processes a trial. ``min_workers_per_trial``: a trial
    starts, and goes on where nodes went away, with so few, and takes more when they come; None: all or none.
    ``data_parallel``: ddp: each worker keeps all of the optimiser's state; fsdp: its share, for classifiers that do not
    fit. ``actors`` denoise or certify; a cluster with less room goes on with ``min_actors``. GPUs: a whole number, or a
    share of one, so that several fit on it. ``batch_size``: of samples in an actor, None: it finds the fastest.

    ``pool``: where trials find denoised training images: Ray's object store, the run's folder, or nowhere, so that
    each trial denoises its own; of the same training. ``pool_gb``: at most so much of them is kept, the first epochs.
    """

    workers_per_trial: Annotated[int, Field(ge=0)] = 1
    min_workers_per_trial: Count | None = None
    data_parallel: Literal["ddp", "fsdp"] = "ddp"
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
