"""A whole study: denoised pool, search, certificates, report; from the first step that is not done yet."""

import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from cadis_ray.certification.evidence import write_evidence
from cadis_ray.certification.request import Model, Request
from cadis_ray.data import load
from cadis_ray.engine.capacity import actor_demand, check_capacity, trial_demand
from cadis_ray.engine.certification import certify_models, estimate_models, examples_of
from cadis_ray.engine.cluster import cluster, machines
from cadis_ray.engine.pool import make_pool
from cadis_ray.engine.search import run_search
from cadis_ray.interface.progress import Progress
from cadis_ray.results.study import StudyResult, summarise
from cadis_ray.search.importance import importance
from cadis_ray.search.objective import to_recount
from cadis_ray.search.proposal import ENDED, settle
from cadis_ray.search.trials import TrialResult, trial_results
from cadis_ray.smoothing.counts import CountsStore
from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.storage.ledger import Ledger
from cadis_ray.storage.provenance import commit, hardware, versions
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.folder import fingerprint, whole_fingerprint
from cadis_ray.study.study import Study, configuration


def finish_study(study: Study, run_dir: Path, ledger: Ledger, address: str, progress: Progress) -> StudyResult:
    """Run or finish a study in ``run_dir``. Nothing that the ledger or the counts hold is done again.

    Raises EnvironmentProblem where the cluster can never hold ``resources``, and Interrupted on SIGINT and SIGTERM,
    with everything committed.
    """
    known, now = ledger.meta("fingerprint"), fingerprint(study)
    whole = known not in (None, now) and known == whole_fingerprint(study)
    if not whole:
        ledger.set_meta("fingerprint", now)
    data = load(study.base.data)
    counted = data.validation.first(study.base.validation.images)
    ledger.set_meta("validation images", counted.digest())  # the fingerprint does not know where the data lies
    labels = counted.labels.numpy()
    settle(study, ledger, labels)
    total = len(study.baselines) + study.trials
    ended = sum(row.state in ENDED for row in ledger.trials())
    with cluster(address, study.resources):
        check_capacity([actor_demand(study.resources), *([trial_demand(study.resources)] if ended < total else [])])
        made_by = {"commit": commit(), "versions": versions(), "hardware": hardware(), "cluster": machines()}
        ledger.set_meta(f"driver {time.time():.3f}", json.dumps(made_by))
        if ended < total:
            pool = make_pool(study, RunFolder(run_dir).pool, progress)
            progress.stage("search", total, ended)
            run_search(study, ledger, labels, pool, run_dir, _session(run_dir), _reporter(ledger, progress))
            shutil.rmtree(RunFolder(run_dir).pool)  # nothing trains any more
        trials = trial_results(study, ledger, labels)
        result = summarise(study, run_dir, trials, _recount(study, run_dir, ledger, trials, whole, progress))
        result = _certify(study, run_dir, ledger, result, whole, progress)
    return replace(result, importance=importance(study, trials))


def _recount(
    study: Study, run_dir: Path, ledger: Ledger, trials: list[TrialResult], whole: bool, progress: Progress
) -> dict[str, Estimate]:
    """Estimates of the finalists from fresh noise; of the baseline that limits clean accuracy too, to judge them by."""
    models = _models(study, run_dir, ledger, to_recount(study, trials))
    request = Request(study.base, models, study.seed, study.finalists, whole)
    if not models:
        return {}
    return estimate_models(request, CountsStore(RunFolder(run_dir).counts), progress, study.resources)


def _certify(
    study: Study, run_dir: Path, ledger: Ledger, result: StudyResult, whole: bool, progress: Progress
) -> StudyResult:
    """With certificates of the winner and of every baseline that ended well; none without a winner."""
    if result.winner is None:
        return result
    baselines = [trial.name for trial in result.trials if trial.baseline and trial.state == "complete"]
    request = Request(study.base, _models(study, run_dir, ledger, [result.winner, *baselines]), study.seed, whole=whole)
    certificates = certify_models(request, CountsStore(RunFolder(run_dir).counts), progress, study.resources)
    write_evidence(run_dir, request, certificates, "cuda" if study.resources.gpus_per_actor else "cpu")
    examples = examples_of(request, result.winner, run_dir, study.resources)
    return replace(result, certificates=certificates, examples=examples)


def _models(study: Study, run_dir: Path, ledger: Ledger, names: Iterable[str]) -> dict[str, Model]:
    """The trials' last checkpoints, in the order of ``names``."""
    rows = {row.name: row for row in ledger.trials()}
    return {
        name: Model(
            configuration(study, row.parameters),
            RunFolder(run_dir).checkpoint(row.checkpoint) if row.checkpoint else None,
        )
        for name in names
        for row in [rows[name]]
    }


def _session(run_dir: Path) -> str:
    """A new name for every driver of a run: Tune's and Train's own folders are caches and never shared.

    Where Tune's are lost, Train's tell: it would go on from checkpoints of an equal name by itself.
    """
    taken = [path.name for part in ("tune", "training") for path in (run_dir / part).glob("*session-*")]
    return f"session-{max((int(name.rpartition('-')[2]) for name in taken), default=-1) + 1:03d}"


def _reporter(ledger: Ledger, progress: Progress) -> Callable[[int, str, dict[str, float]], None]:
    best = -np.inf

    def report(number: int, state: str, scores: dict[str, float]) -> None:
        nonlocal best
        rows = ledger.trials()
        if state == "complete":
            best = max(best, ledger.epochs(number)[-1].metrics["acr"])
        progress.advance(
            int(state in ENDED),
            running=sum(row.state == "running" for row in rows),
            failed=sum(row.state == "failed" for row in rows),
            best=best if np.isfinite(best) else None,
        )

    return report
