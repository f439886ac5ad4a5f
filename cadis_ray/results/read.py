"""A run's folder read back into what its outputs are made of; needs neither the data nor the models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cadis_ray.certification.certificates import Certificates, certificates_from
from cadis_ray.certification.evidence import evidence_of
from cadis_ray.certification.examples import read_examples
from cadis_ray.certification.logs import read_log
from cadis_ray.errors import IntegrityError
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.results.records import estimate_of
from cadis_ray.results.study import StudyResult
from cadis_ray.search.objective import metrics_of
from cadis_ray.search.trials import TrialResult, trial_result
from cadis_ray.smoothing.bounds import same_numbers
from cadis_ray.smoothing.counts import NO_BLOCKS, Blocks, CountsStore, Source
from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.smoothing.modes import MODES
from cadis_ray.storage.ledger import Ledger, TrialRow
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.study import Study, searched_paths


def read_result(study: Study, run_dir: Path, ledger: Ledger) -> StudyResult:
    """The results of a run as they stand.

    Estimates are those of result.json; of a run that has not ended, what the last epoch reported, without certified
    accuracies. Certificates follow anew from the stored votes. Raises IntegrityError where files contradict.
    """
    ending = RunFolder(run_dir).ending()
    search = ending.get("search", {})
    said = {record["name"]: record for record in ending.get("table", [])}
    names = [record["name"] for record in ending.get("certificates", [])]
    stored = CountsStore(RunFolder(run_dir).counts).load() if names else {}
    return StudyResult(
        name=study.name,
        run_dir=run_dir,
        radii=study.base.certification.radii,
        searched=searched_paths(study),
        trials=[_trial(study, ledger, row, said.get(row.name)) for row in ledger.trials()],
        winner=ending.get("winner"),
        certificates={name: _certificates(run_dir, study.base, name, stored) for name in names},
        metrics=metrics_of(study.objective),
        clean_limit=search.get("clean_limit"),
        front=tuple(search.get("front", ())),
        importance=search.get("importance", {}),
        examples=read_examples(run_dir),
    )


def _trial(study: Study, ledger: Ledger, row: TrialRow, said: Mapping[str, Any] | None) -> TrialResult:
    epochs = ledger.epochs(row.number)
    estimate, recount = (estimate_of(said.get(key)) if said else None for key in ("estimate", "recount"))
    if said is None and epochs and row.state != "failed":
        last = epochs[-1]
        acr, se, clean = (last.metrics[key] for key in ("acr", "acr_se", "clean"))
        images, samples = len(last.counts), int(last.counts[0].sum())
        estimate = Estimate(acr, se, clean, {}, study.base.certification.n, images, samples)
    return trial_result(row, epochs, estimate, recount)


def _certificates(run_dir: Path, base: Configuration, name: str, stored: Mapping[Source, Blocks]) -> Certificates:
    records, settings = evidence_of(run_dir, name), base.certification
    if not records:
        raise IntegrityError(f"{RunFolder(run_dir).evidence(name)}: holds no record")
    first, mode = records[0], MODES[settings.mode]
    ids, label = (np.array([record[key] for record in records]) for key in ("image_id", "label"))
    hashes, root = (first["weights_sha256"], first["denoiser_sha256"], first["data_sha256"]), first["noise_root"]
    votes = {}
    for stream, n in mode.most(settings).items():
        blocks = stored.get(Source(*hashes, base.sigma, root, int(stream)), NO_BLOCKS)
        votes[stream] = blocks.prefix(ids, n, len(first["n0_counts"]))
    if mode.lacking(settings, base.sigma, label, votes).any():
        raise IntegrityError(f"{run_dir}: votes of {name} are missing; finish the run, or restore its counts folder")
    log = read_log(RunFolder(run_dir).certificates(name))
    found = certificates_from(name, base, ids, label, votes, log.seconds)
    if not (np.array_equal(log.idx, ids) and same_numbers(log.radius, found.radius)):
        raise IntegrityError(f"{log.path}: not what the votes say; check: python -m cadis_ray.certify verify {run_dir}")
    return found
