"""The command line: bad input, dry run, refusals. A study that runs is tested in tests/engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cadis_ray.study.folder import default_folder, open_folder
from cadis_ray.study.load import load_study
from tests.helpers.places import DIGITS


def tune(*arguments: object, where: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cadis_ray.tune", *map(str, arguments)]
    return subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=120)


@pytest.mark.process
def test_every_problem_of_a_study_in_one_message(tmp_path: Path) -> None:
    text = DIGITS.read_text().replace("sigma: 0.5", "sigma: 1e9").replace("epochs: ", "epochz: ")
    (tmp_path / "bad.yaml").write_text(text.replace("alpha: 0.001", "alpha: small"))
    done = tune("bad.yaml", where=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for expected in ("base.sigma", "did you mean", "epochz", "certification.alpha", "'small'"):
        assert expected.lower() in done.stderr.lower()
    assert all(line.startswith("bad.yaml:") for line in done.stderr.strip().splitlines())
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.yaml"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a study file, or --resume"),
        ((DIGITS, "--address", "auto"), "address: got 'auto'"),
        ((DIGITS, "--out", "s3://bucket/run"), "must be a folder, not a URI"),
        (("nowhere.yaml",), "nowhere.yaml"),
        (("--resume", "nowhere"), "not a run's folder"),
    ],
)
def test_wrong_arguments_exit_2_with_one_message(tmp_path: Path, arguments: tuple, said: str) -> None:
    done = tune(*arguments, where=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.process
def test_dry_run_prints_the_plan_and_leaves_nothing(tmp_path: Path) -> None:
    done = tune(DIGITS, "--dry-run", where=tmp_path)
    assert done.returncode == 0, done.stderr
    study = load_study(DIGITS)
    certification = study.base.certification
    calls = certification.images * (certification.n0 + certification.n) * 3
    assert f"{calls:,}" in done.stdout
    assert str(tmp_path / "runs" / "digits-") in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_run_is_never_taken_over_by_another_study(tmp_path: Path) -> None:
    study = load_study(DIGITS)
    open_folder(study, DIGITS.read_text(), tmp_path / "run")
    open_folder(study, DIGITS.read_text(), tmp_path / "run")
    done = tune(DIGITS, "--dry-run", "--out", tmp_path / "run", where=tmp_path)
    assert done.returncode == 0
    other = tmp_path / "other.yaml"
    other.write_text(DIGITS.read_text().replace("seed: 0", "seed: 1"))
    done = tune(other, "--out", tmp_path / "run", where=tmp_path)
    assert done.returncode == 2
    assert "another study" in done.stderr
    stored = json.loads((tmp_path / "run" / "study.json").read_text())
    assert stored["seed"] == 0


def test_a_job_s_run_does_not_lie_in_the_copy_that_ray_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(DIGITS)
    here = default_folder(study)
    copy = tmp_path / "runtime_resources" / "working_dir_files"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    folder = default_folder(study)
    assert not folder.is_relative_to(copy)
    assert folder.name == here.name
