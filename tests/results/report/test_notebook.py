"""A run in a notebook: frames that say what the run's own files say."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import cadis_ray
from cadis_ray.errors import IntegrityError, UsageError
from cadis_ray.storage.ledger import Ledger
from cadis_ray.study.folder import open_folder
from cadis_ray.study.load import load_study
from tests.helpers.finished import NAME, write_finished
from tests.helpers.places import DIGITS


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finished(tmp_path_factory.mktemp("notebook") / "run")


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
