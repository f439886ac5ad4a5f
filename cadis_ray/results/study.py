"""What a study has to say: plain data, from which table, report, MLflow and result.json are made."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cadis_ray.certification.certificates import Certificates
from cadis_ray.certification.examples import Examples
from cadis_ray.search.objective import best_trial, limit_of, metrics_of, pareto_front
from cadis_ray.search.trials import TrialResult
from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.study.study import Study, searched_paths


@dataclass(frozen=True)
class StudyResult:
    """Everything the outputs are made of. ``winner`` is a trial's name; certificates go by trial or baseline.

    ``metrics``: what was maximised, "acr", "clean" or the radius of a certified accuracy. ``clean_limit``: the least
    feasible clean accuracy by the search's estimates. ``front``: the names on the Pareto front by these.
    ``importance``: of each parameter for the first metric, the largest first; shares that sum to 1. ``examples``: what
    the winner was shown.
    """

    name: str
    run_dir: Path
    radii: tuple[float, ...]
    searched: tuple[str, ...]
    trials: list[TrialResult]
    winner: str | None
    certificates: dict[str, Certificates]
    metrics: tuple[str | float, ...] = ("acr",)
    clean_limit: float | None = None
    front: tuple[str, ...] = ()
    importance: dict[str, float] = field(default_factory=dict)
    examples: Examples | None = None


def summarise(study: Study, run_dir: Path, trials: list[TrialResult], recounts: Mapping[str, Estimate]) -> StudyResult:
    """The result without certificates. ``recounts``: by name, of those in ``to_recount``, which alone decide."""
    judged = [replace(trial, estimate=recounts[trial.name]) for trial in trials if trial.name in recounts]
    best = best_trial(judged, study.objective)
    front = pareto_front(trials, study.objective)
    return StudyResult(
        name=study.name,
        run_dir=run_dir,
        radii=study.base.certification.radii,
        searched=searched_paths(study),
        trials=[replace(trial, recount=recounts.get(trial.name)) for trial in trials],
        winner=best.name if best else None,
        certificates={},
        metrics=metrics_of(study.objective),
        clean_limit=limit_of(trials, study.objective),
        front=tuple(trial.name for trial in front),
    )
