"""Runs that former versions made: they verify, compare and export ever after, wherever they were moved to."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

import cadis_ray
from cadis_ray.certification.evidence import recompute, verify
from cadis_ray.compare import Format, compare
from cadis_ray.export import Target, export
from cadis_ray.storage.run_folder import RunFolder
from tests.helpers.places import OLD_RUNS

FINISHED = ("digits", "systems_digits")


@pytest.fixture(params=FINISHED)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with tarfile.open(OLD_RUNS / f"{request.param}.tar.xz") as held:
        held.extractall(tmp_path, filter="data")
    return tmp_path / request.param


def test_an_old_run_verifies_with_its_votes_counted_again(run: Path) -> None:
    assert verify(run) == []
    again, different = recompute(run, 0.05, "cpu", np.random.default_rng(0))
    assert again > 0
    assert different == []


def test_an_old_run_compares(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare([run], format=Format.JSON)
    rows = json.loads(capsys.readouterr().out)
    assert {record["name"] for record in RunFolder(run).ending()["certificates"]} <= {row["name"] for row in rows}


def test_an_old_run_exports_and_is_read_in_a_notebook(run: Path, tmp_path: Path) -> None:
    winner = cadis_ray.load(run).result.winner
    assert winner is not None
    # The winner of systems_digits is of a kind that is not exported.
    export(run, Target.SAFETENSORS, tmp_path / "out", winner if run.name == "digits" else "off_the_shelf")
    assert cadis_ray.SmoothedClassifier.load(tmp_path / "out")
