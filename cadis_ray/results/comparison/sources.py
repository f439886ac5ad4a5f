"""What there is to compare: finished runs of studies, what ``certify`` wrote, and logs of other programs."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cadis_ray.certification.logs import Log, read_log
from cadis_ray.errors import IntegrityError, UsageError
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.results.comparison.compare import Certified, ComparedModel, Comparison, Protocol
from cadis_ray.results.records import estimate_of, flat
from cadis_ray.search.trials import TrialResult
from cadis_ray.smoothing.metrics import acr
from cadis_ray.smoothing.settings import Certification
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.study import configuration, read_study

LOG_RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
NUMBER = r"\d*\.?\d+(?!\.?\d)"
SIGMA = re.compile(rf"_?(?:noise_{NUMBER}_)?(?:test_)?(?<![A-Za-z])sigma[_=-]?({NUMBER})")
# What only ft_cadis uses, of the section finetuning.
OBJECTIVE = {
    "adv_weight", "attack_radius", "attack_steps", "renormalise", "warm_start", "detach_target", "select", "confidence",
    "update_selection", "mask", "target", "reduction", "attack_radius_doubles_after",
}  # fmt: skip
UNKNOWN = (
    "A log tells neither n nor alpha: ACR and certified accuracy compare only where these are equal.",
    "Most programs print radii rounded to three digits: 0.4996 is in such a log as 0.5 and counts as certified at 0.5.",
)


def read_logs(paths: Sequence[Path], sigma: float | None = None) -> Comparison:
    """A model a log, named by its file, or by its path where files share a name.

    ``sigma`` > 0 holds for all; without it a log's is what its file name says after ``sigma``, else unknown. What is
    left of the name without that, and without ``noise_X_test``, is the method. Raises UsageError for a log given
    twice and DataError for one that cannot be read.
    """
    stems = [re.sub(r"\.(tsv|txt|csv|log)$", "", path.name) for path in paths]
    names = [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--logs: {', '.join(twice)} given twice; need each log once")
    models = []
    for name, stem, path in zip(names, stems, paths, strict=True):
        said = SIGMA.search(stem)
        its = sigma or (float(said.group(1)) if said else 0) or None
        method = SIGMA.sub("", stem, count=1) or path.parent.name or "logs"
        models.append(ComparedModel(name, {}, _certified(read_log(path), method, its, None)))
    return Comparison("logs", None, tuple(models), LOG_RADII, notes=UNKNOWN)


def read_run(folder: Path) -> Comparison:
    """The trials and certificates of a study's run, compared to its first certified baseline; or what certify wrote.

    Raises UsageError for a folder that is neither or not finished, IntegrityError where its files contradict.
    """
    files = RunFolder(folder)
    if files.request.exists() and not files.result.exists():
        return _certified_models(folder, _json(files.request))
    study, result = read_study(folder), _json(files.result)
    if "table" not in result:
        raise UsageError(f"{folder}: {result['status']}, nothing to compare; finish it: {result['resume_command']}")
    settings, sigma = study.base.certification, study.base.sigma
    certified = {}
    for record in result["certificates"]:
        name = record["name"]
        log = read_log(RunFolder(folder).certificates(name))
        stored = record[f"acr@{record['n']}"]
        if not np.isclose(acr(log.radius, log.correct), stored, rtol=0, atol=1e-9):
            raise IntegrityError(
                f"{RunFolder(folder).certificates(name)}: its ACR is not that of result.json, {stored}; one was changed"
            )
        method = "winner" if name == result["winner"] else name
        certified[name] = _certified(log, method, sigma, _protocol(settings))
    models = []
    for record in result["table"]:
        own = configuration(study, record["parameters"])
        trial = TrialResult(
            record["number"], record["name"], record["baseline"], record["state"], record["reason"],
            record["parameters"], estimate_of(record.get("estimate")),
        )  # fmt: skip
        models.append(ComparedModel(trial.name, _parameters(own), certified.get(trial.name), trial))
    baselines = {m.trial.number: m.name for m in models if m.certified and m.trial and m.trial.baseline}
    first = baselines[min(baselines)] if baselines else None
    return Comparison(study.name, study.base.data.name, tuple(models), settings.radii, result["winner"], first)


def read_runs(name: str, folders: Mapping[str, Path]) -> Comparison:
    """Runs together: where they are several, models are RUN/NAME, compared to the first run's baseline, and none is
    the winner. Raises as ``read_run``."""
    runs = {run: read_run(folder) for run, folder in folders.items()}
    if len(runs) == 1:
        return replace(*runs.values(), name=name)
    models = [
        replace(model, name=f"{run}/{model.name}",
                trial=model.trial and replace(model.trial, name=f"{run}/{model.name}"))
        for run, found in runs.items()
        for model in found.models
    ]  # fmt: skip
    data_sets, (first, shown) = {found.dataset for found in runs.values()}, next(iter(runs.items()))
    baseline = None if shown.baseline is None else f"{first}/{shown.baseline}"
    return Comparison(
        name, data_sets.pop() if len(data_sets) == 1 else None, tuple(models), shown.radii, None, baseline
    )


def _certified_models(folder: Path, request: Mapping[str, Any]) -> Comparison:
    try:
        base = Configuration.model_validate_json(json.dumps(request["base"]))
        own = {
            name: Configuration.model_validate_json(json.dumps(model["configuration"]))
            for name, model in request["models"].items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{folder}: its certificates/request.json was changed: {error}") from error
    models = []
    for name, chosen in own.items():
        path, protocol = RunFolder(folder).certificates(name), _protocol(base.certification)
        if not path.exists():
            raise UsageError(f"{folder}: {name} is not certified yet; finish it with certify --resume")
        models.append(ComparedModel(name, _parameters(chosen), _certified(read_log(path), name, base.sigma, protocol)))
    return Comparison(folder.resolve().name, base.data.name, tuple(models), base.certification.radii)


def _certified(log: Log, method: str, sigma: float | None, protocol: Protocol | None) -> Certified:
    """A log's certificates by image, so that the same images stand in the same rows whatever their order was."""
    by = np.argsort(log.idx)
    return Certified(
        method, sigma, protocol, log.idx[by], log.label[by], log.predict[by], log.radius[by], log.correct[by]
    )


def _protocol(settings: Certification) -> Protocol:
    return Protocol(settings.mode, settings.n0, settings.n, settings.alpha)


def _parameters(own: Configuration) -> dict[str, Any]:
    """By dotted path, without what the recipe does not use."""
    raw = own.model_dump(mode="json")
    tuning = raw["finetuning"]
    if own.finetuning.recipe == "none":
        raw["finetuning"] = {"recipe": "none"}
    elif own.finetuning.recipe != "ft_cadis":
        unused = OBJECTIVE - {"attack_radius", "attack_steps"} if own.finetuning.recipe == "smoothadv" else OBJECTIVE
        raw["finetuning"] = {key: value for key, value in tuning.items() if key not in unused}
    return dict(flat(raw))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); need the folder of an ended run") from error
    except ValueError as error:
        raise IntegrityError(f"{path}: damaged: {error}") from error
