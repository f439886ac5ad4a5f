"""A run in a notebook: frames that say what the run's own files say."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import cadis_ray
from cadis_ray.certification.certificates import Certificates
from cadis_ray.certification.tsv import write_certificates
from cadis_ray.errors import IntegrityError, UsageError
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


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one certified trial and one that failed."""
    folder = tmp_path_factory.mktemp("notebook") / "run"
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


def test_frames_say_what_the_files_do(run_dir: Path) -> None:
    run = cadis_ray.load(run_dir)
    stored = json.loads((run_dir / "result.json").read_text())
    assert run.trials.loc[NAME, "finetuning.adv_weight"] == 2.5
    assert run.trials.loc[NAME, "estimate.acr@400"] == 0.4
    assert run.trials.loc["trial-0001", "state"] == "failed"
    assert run.epochs.loc[(NAME, 2), "acr"] == 0.4
    assert run.models.loc[NAME, "acr@400"] == stored["certificates"][0]["acr@400"]
    frame = run.certificates.loc[NAME]
    assert frame.index.tolist() == [0, 7, 14, 21, 28, 35]
    assert (frame.radius * frame.correct).mean() == pytest.approx(stored["certificates"][0]["acr@400"], abs=1e-12)
    c = run.result.certificates[NAME]
    assert (c.estimation.sum(axis=1) == 400).all()
    drawn = run.figures["certified_accuracy"].axes[0].lines[0].get_ydata()
    assert np.asarray(drawn)[0] == pytest.approx(100 * frame.correct[frame.radius > 0].sum() / 6)


def test_the_page_is_escaped_and_well_formed(run_dir: Path) -> None:
    page = cadis_ray.load(run_dir)._repr_html_()
    open_tags: list[str] = []

    class Balanced(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            assert tag != "script"
            open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Balanced().feed(page)
    assert open_tags == []
    assert "trial-0000 *" in page
    assert "&lt;script&gt;" in page


def test_certificates_that_their_votes_do_not_give_are_refused(run_dir: Path, tmp_path: Path) -> None:
    for path in run_dir.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(run_dir)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(run_dir)).write_bytes(path.read_bytes())
    tsv = tmp_path / "certificates" / f"{NAME}.tsv"
    whole = tsv.read_text()
    first = whole.splitlines()[1].split("\t")[3]
    tsv.write_text(whole.replace(first, "0.123", 1))
    with pytest.raises(IntegrityError, match="not what the votes say"):
        cadis_ray.load(tmp_path)
    tsv.write_text(whole)
    next((tmp_path / "counts").iterdir()).unlink()
    with pytest.raises(IntegrityError, match=r"votes of trial-0000 are missing"):
        cadis_ray.load(tmp_path)


def test_a_run_that_goes_on_shows_its_last_epochs(run_dir: Path, tmp_path: Path) -> None:
    study = load_study(DIGITS)
    open_folder(study, DIGITS.read_text(), tmp_path / "run")
    with pytest.raises(UsageError, match="no ledger"):
        cadis_ray.load(tmp_path / "run")
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        ledger.open_trial(0, NAME, None, {})
        ledger.record_epoch(0, 1, {"acr": 0.25, "acr_se": 0.5, "clean": 0.9}, np.full((20, 11), 3))
    run = cadis_ray.load(tmp_path / "run")
    assert run.trials.loc[NAME, ["state", "estimate.acr@400", "estimate.samples"]].tolist() == ["running", 0.25, 33]
    assert run.models.empty
    assert run.certificates.empty
    assert "trial-0000" in run._repr_html_()


@pytest.mark.process
def test_importing_the_package_stays_cheap() -> None:
    slow = ("torch", "ray", "mlflow", "numpy", "pandas", "matplotlib")
    code = f"import sys, cadis_ray; print(*[name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
