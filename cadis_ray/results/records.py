"""What came out, as plain data for JSON."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cadis_ray.certification.certificates import Certificates
from cadis_ray.errors import IntegrityError
from cadis_ray.results.study import StudyResult
from cadis_ray.search.objective import violation
from cadis_ray.search.trials import TrialResult
from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.smoothing.metrics import PairedDifference, acr, certified_accuracy, paired_difference
from cadis_ray.storage.files import write_whole
from cadis_ray.storage.run_folder import RunFolder


def write_result(run_dir: Path, payload: dict[str, Any]) -> None:
    """Write ``run_dir/result.json``. Raises ``ValueError`` for NaN or infinity, which are not JSON."""
    write_whole(RunFolder(run_dir).result, json.dumps(payload, indent=2, allow_nan=False) + "\n")


def label(metric: str | float) -> str:
    """A metric's name for readers."""
    names = {"acr": "ACR", "clean": "clean accuracy"}
    return names[metric] if isinstance(metric, str) else f"certified accuracy at {metric:g}"


def finalists(result: StudyResult) -> list[TrialResult]:
    """The trials that were counted again, the best by that count first."""
    found = [trial for trial in result.trials if trial.recount and not trial.baseline]
    return sorted(found, key=lambda trial: -trial.recount.acr if trial.recount else 0.0)


def search_record(result: StudyResult) -> dict[str, Any]:
    """For JSON: how many configurations were tried, the objective, its limit and front, and the finalists by name."""
    searched = [trial for trial in result.trials if not trial.baseline]
    return {
        "configurations_tried": len(searched),
        "maximised": [label(metric) for metric in result.metrics],
        "clean_limit": result.clean_limit,
        "infeasible": [t.name for t in searched if t.estimate and violation(t.estimate, result.clean_limit)],
        "front": list(result.front),
        "finalists": [trial.name for trial in finalists(result)],
        "importance": result.importance,
    }


def estimate_of(record: Mapping[str, Any] | None) -> Estimate | None:
    """The estimate of a line of result.json's table."""
    if record is None:
        return None
    at = next(key for key in record if key.startswith("acr@"))
    shares = {float(r): share for r, share in record["certified_accuracy"].items()}
    n = int(at.removeprefix("acr@"))
    return Estimate(record[at], record["se"], record["clean"], shares, n, record["images"], record["samples"])


CALLS = {"classifier_calls": "C calls", "denoiser_calls": "D calls", "queries": "queries"}


def ranked(result: StudyResult) -> list[TrialResult]:
    """Trials and baselines by estimated ACR, the best first; those without an estimate last, by number."""
    return sorted(result.trials, key=lambda t: (-t.estimate.acr if t.estimate else np.inf, t.number))


def trial_records(result: StudyResult) -> list[dict[str, Any]]:
    """One dict for JSON a trial or baseline, ranked, numbers unrounded; accuracies are shares in [0, 1]."""
    records = []
    for trial in ranked(result):
        record: dict[str, Any] = {
            "name": trial.name, "number": trial.number, "baseline": trial.baseline,
            "state": trial.state, "reason": trial.reason, "parameters": dict(trial.parameters),
            "trainable_parameters": trial.trainable_parameters, "cost": cost(trial),
        }  # fmt: skip
        for name, estimate in (("estimate", trial.estimate), ("recount", trial.recount)):
            if estimate:
                record[name] = {
                    f"acr@{estimate.n}": estimate.acr, "se": estimate.se, "clean": estimate.clean,
                    "certified_accuracy": {str(r): share for r, share in estimate.certified_accuracy.items()},
                    "images": estimate.images, "samples": estimate.samples,
                }  # fmt: skip
        records.append(record)
    return records


def cost(trial: TrialResult) -> dict[str, float]:
    """What a trial's epochs took together: calls of classifier and denoiser, and seconds; queries of a black box."""
    kinds = (*CALLS, "seconds")
    return {kind: sum(e.get(kind, 0) for e in trial.epochs) for kind in kinds if any(kind in e for e in trial.epochs)}


def contribution(certificates: Certificates) -> np.ndarray:
    """radius * [correct] of every image (N,), float64: its mean is the certified ACR."""
    return certificates.radius * certificates.correct.astype(bool)


def difference(result: StudyResult, name: str) -> PairedDifference | None:
    """Certified ACR of the winner minus that of ``name`` over the same test images.

    None for the winner itself, and where one image gives no interval.

    Raises ``IntegrityError`` where they were certified on other images or with another sigma, n or alpha.
    """
    if result.winner is None or name == result.winner or result.winner not in result.certificates:
        return None
    winner, other = result.certificates[result.winner], result.certificates[name]
    settings = [(c.sigma, c.n0, c.n, c.alpha, c.idx.tolist()) for c in (winner, other)]
    if settings[0] != settings[1]:
        raise IntegrityError(
            f"{result.run_dir}: {winner.name} and {name} were certified on other images or with another"
            " sigma, n0, n or alpha; certify both again under one setting"
        )
    return paired_difference(contribution(winner), contribution(other)) if len(winner.idx) > 1 else None


def certificate_records(result: StudyResult) -> list[dict[str, Any]]:
    """One dict for JSON a certified model, by certified ACR; accuracies are shares in [0, 1]."""
    records = []
    for name, c in result.certificates.items():
        record: dict[str, Any] = {
            "name": name, "winner": name == result.winner, f"acr@{c.n}": acr(c.radius, c.correct),
            "certified_accuracy": {str(r): certified_accuracy(c.radius, c.correct, r) for r in result.radii},
            "abstained": int(np.sum(c.predict == -1)), "images": len(c.idx),
            "sigma": c.sigma, "n0": c.n0, "n": c.n, "alpha": c.alpha, "winner_minus_this": None,
        }  # fmt: skip
        paired = difference(result, name)
        if paired:
            record["winner_minus_this"] = {
                "mean": paired.mean, "se": paired.se, "low_95": paired.low, "high_95": paired.high
            }  # fmt: skip
        records.append(record)
    return sorted(records, key=lambda record: -record[f"acr@{record['n']}"])


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of all that nested mappings hold; an empty mapping is a value."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def records(result: StudyResult) -> dict[str, Any]:
    """The part of result.json that says what came out."""
    return {
        "winner": result.winner,
        "search": search_record(result),
        "table": trial_records(result),
        "certificates": certificate_records(result),
    }
