"""A finished run of the digits study, made without Ray and without any model."""

import json
from pathlib import Path

import numpy as np

from cadis_ray.certification.certificates import Certificates
from cadis_ray.certification.tsv import write_certificates
from cadis_ray.results.records import records, write_result
from cadis_ray.results.study import StudyResult
from cadis_ray.search.trials import TrialResult
from cadis_ray.smoothing.bounds import certify
from cadis_ray.smoothing.counts import Blocks, CountsStore, Source
from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.smoothing.noise import Stream
from cadis_ray.storage.ledger import Ledger
from cadis_ray.study.folder import open_folder
from cadis_ray.study.load import load_study
from tests.helpers.places import DIGITS

NAME, HOSTILE = "trial-0000", "loss is <script>alert(1)</script>"
SAID = {"weights_sha256": "aa", "denoiser_sha256": "bb", "data_sha256": "cc", "noise_root": 0}


def write_finished(folder: Path) -> Path:
    """Write the folder of a run that is done, with one certified trial and one that failed; returns it."""
    study = load_study(DIGITS)
    open_folder(study, DIGITS.read_text(), folder)
    settings, images = study.base.certification, 6
    chance = np.random.default_rng(0)
    shares = chance.dirichlet(np.r_[9, np.full(10, 0.1)], images)
    votes = {s: chance.multinomial(n, shares) for s, n in
             ((Stream.SELECTION, settings.n0), (Stream.ESTIMATION, settings.n))}  # fmt: skip
    ids, label = np.arange(images) * 7, np.array([0, 0, 0, 0, 1, 0])
    for stream, counted in votes.items():
        index = np.stack([ids, np.zeros(images, int), counted.sum(axis=1)], axis=1)
        CountsStore(folder / "counts").commit(Source("aa", "bb", "cc", 0.5, 0, int(stream)), Blocks(index, counted))
    predict, radius, p_a_lower = certify(votes[Stream.SELECTION], votes[Stream.ESTIMATION], settings.alpha, 0.5)
    certified = Certificates(
        NAME, "protocol", 0.5, settings.n0, settings.n, settings.alpha, ids, label, predict, radius, predict == label,
        np.ones(images), votes[Stream.SELECTION], votes[Stream.ESTIMATION], p_a_lower,
    )  # fmt: skip
    weight = {"finetuning.adv_weight": 2.5}
    estimate = Estimate(0.4, 0.01, 0.9, dict.fromkeys(settings.radii, 0.5), settings.n, 20, 8)
    with Ledger(folder / "ledger.sqlite") as ledger:
        ledger.open_trial(0, NAME, None, weight)
        for epoch in (1, 2):
            metrics = {"acr": 0.2 * epoch, "acr_se": 0.01, "clean": 0.9}
            ledger.record_epoch(0, epoch, metrics, np.full((20, 11), epoch))
        ledger.close_trial(0, "complete", trainable_parameters=321)
        ledger.open_trial(1, "trial-0001", None, weight)
        ledger.close_trial(1, "failed", HOSTILE)
    trials = [TrialResult(0, NAME, False, "complete", None, weight, estimate, trainable_parameters=321),
              TrialResult(1, "trial-0001", False, "failed", HOSTILE, weight, None)]  # fmt: skip
    result = StudyResult("digits", folder, settings.radii, tuple(study.space), trials, NAME, {NAME: certified})
    write_certificates(folder, result.certificates, NAME)
    lines = [json.dumps({"image_id": int(i), "label": int(y), "n0_counts": [0] * 11, **SAID})
             for i, y in zip(ids, label, strict=True)]  # fmt: skip
    (folder / "certificates" / f"{NAME}.jsonl").write_text("\n".join(lines) + "\n")
    write_result(folder, {"status": "done", "exit_code": 0} | records(result))
    return folder
