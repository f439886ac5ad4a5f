"""A run that a former version was killed in goes on where it stood."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from cadis_ray.certification.evidence import verify
from cadis_ray.engine.study import finish_study
from cadis_ray.errors import IntegrityError
from cadis_ray.interface.progress import Progress
from cadis_ray.storage.ledger import Ledger
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.folder import fingerprint
from cadis_ray.study.load import load_study
from tests.helpers.engine import Cluster
from tests.helpers.places import DIGITS, OLD_RUNS

# What the undisturbed run drew and found; another processor rounds otherwise, so the ACR is compared with a margin.
UNDISTURBED = json.loads((OLD_RUNS / "undisturbed.json").read_text())


def test_a_killed_run_of_a_former_version_is_finished(cluster: Cluster, tmp_path: Path) -> None:
    with tarfile.open(OLD_RUNS / "killed.tar.xz") as held:
        held.extractall(tmp_path, filter="data")
    folder = RunFolder(tmp_path / "killed")
    with folder.open_ledger() as ledger:
        before = {row.name: ledger.epochs(row.number)[-1].counts for row in ledger.trials() if row.state == "complete"}
    driver = cluster.tune("--resume", folder.path)
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, output
    with Ledger(folder.ledger) as ledger:
        rows = {row.name: (row, ledger.epochs(row.number)[-1]) for row in ledger.trials()}
    assert {name: row.state for name, (row, _) in rows.items()} == dict.fromkeys(UNDISTURBED, "complete")
    assert all((rows[name][1].counts == counts).all() for name, counts in before.items())
    for name, (row, last) in rows.items():
        assert row.parameters == pytest.approx(UNDISTURBED[name]["parameters"])
        assert last.metrics["acr"] == pytest.approx(UNDISTURBED[name]["acr"], abs=0.02)
    assert verify(folder.path) == []


def test_a_run_does_not_go_on_with_other_images(tmp_path: Path) -> None:
    study = load_study(DIGITS)
    with Ledger(RunFolder(tmp_path).ledger) as ledger, Progress(io.StringIO()) as progress:
        ledger.set_meta("fingerprint", fingerprint(study))
        ledger.set_meta("validation images", "of another data set")
        with pytest.raises(IntegrityError, match="validation images is 'of another data set'"):
            finish_study(study, tmp_path, ledger, "nowhere:1", progress)
