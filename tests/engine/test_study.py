"""A whole study on real Ray: its results, and that neither workers nor kills nor signals change them."""

import json
import random
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import cadis_ray
from cadis_ray.compare import Format, compare
from cadis_ray.data import load
from cadis_ray.errors import UsageError
from cadis_ray.finetuning.base_classifier import load_finetuned, model_identity
from cadis_ray.models.denoisers.diffusion import load_denoiser
from cadis_ray.smoothing.bounds import certify
from cadis_ray.smoothing.counts import CountsStore
from cadis_ray.smoothing.noise import Stream, gaussian
from cadis_ray.storage.ledger import Ledger
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.load import load_study
from cadis_ray.study.study import configuration
from tests.helpers.engine import Cluster, epochs_recorded, small_study, write_study

LIMIT = 420


@dataclass(frozen=True)
class Run:
    study: Path
    folder: Path
    output: str

    @property
    def result(self) -> dict:
        return json.loads((self.folder / "result.json").read_text())


def evidence(folder: Path) -> tuple[dict, dict]:
    """Everything a study's results are made of: trials with their counts, and the certification's blocks."""
    with Ledger(folder / "ledger.sqlite") as ledger:
        trials = {
            row.name: (
                row.number,
                row.state,
                row.parameters,
                [(e.epoch, e.counts.tolist()) for e in ledger.epochs(row.number)],
            )
            for row in ledger.trials()
        }
    blocks = CountsStore(folder / "counts").load()
    return trials, {source: (b.index.tolist(), b.votes.tolist()) for source, b in blocks.items()}


@pytest.fixture(scope="module")
def finished(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed run whose trials train in their own processes."""
    folder = tmp_path_factory.mktemp("finished")
    study = write_study(folder / "small.yaml", small_study())
    driver = cluster.tune(study, "--out", folder / "run")
    output, _ = driver.communicate(timeout=LIMIT)
    assert driver.returncode == 0, output
    return Run(study, folder / "run", output)


def test_result_and_outputs(finished: Run) -> None:
    result = finished.result
    assert (result["status"], result["exit_code"]) == ("done", 0)
    assert result["winner"].startswith("trial-")
    states = {row["name"]: row["state"] for row in result["table"]}
    assert len(states) == 5
    assert states["off_the_shelf"] == "complete"
    assert {row["name"] for row in result["certificates"]} == {result["winner"], "off_the_shelf"}
    recounts = {row["name"]: row["recount"]["acr@120"] for row in result["table"] if "recount" in row}
    assert result["search"]["finalists"] == sorted(recounts, key=lambda name: -recounts[name])
    assert result["winner"] == result["search"]["finalists"][0]
    run = cadis_ray.load(finished.folder)
    assert run.result.examples is not None
    assert run.result.examples.name == result["winner"]
    assert set(run.figures) == {path.stem for path in (finished.folder / "figures").iterdir()}
    assert "\x1b" not in finished.output
    assert str(finished.folder / "report.html") in finished.output
    assert not re.search(r"""(src|href)=["']?http|url\(http""", (finished.folder / "report.html").read_text())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own use of SQLAlchemy
def test_an_experiment_of_mlflow_compares_as_its_run_does(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare([finished.folder], format=Format.JSON)
    own = json.loads(capsys.readouterr().out)
    uri, out = f"sqlite:///{finished.folder}/mlflow.db", tmp_path / "rows.json"
    compare(experiment="small", tracking=uri, runs="run", format=Format.JSON, out=out)
    brought = json.loads(out.read_text())
    assert own
    assert own == brought
    with pytest.raises(UsageError, match="--runs: got other; runs of small that have ended: run"):
        compare(experiment="small", tracking=uri, runs="other", format=Format.JSON)
    with pytest.raises(UsageError, match=r"--experiment: got 'large'; MLflow has .*small"):
        compare(experiment="large", tracking=uri, format=Format.JSON)


def test_a_loss_that_is_not_finite_fails_its_trial_at_once_and_only_that(finished: Run) -> None:
    row = next(row for row in finished.result["table"] if row["name"] == "diverging")
    assert row["state"] == "failed"
    assert "not finite" in row["reason"]
    assert evidence(finished.folder)[0]["diverging"][3] == []
    assert sum(row["state"] == "complete" for row in finished.result["table"]) == 4


def test_every_image_and_sample_is_counted_once(finished: Run) -> None:
    study = load_study(finished.study)
    trials, blocks = evidence(finished.folder)
    for _, state, _, epochs in trials.values():
        assert len(epochs) in ({"complete": (1, 2), "failed": (0,)}[state])
        for _, counts in epochs:
            assert (
                np.asarray(counts).sum(axis=1).tolist()
                == [study.base.validation.samples] * study.base.validation.images
            )
    settings = study.base.certification
    wanted = {int(Stream.SELECTION): settings.n0, int(Stream.ESTIMATION): settings.n}
    recounted = {source: found for source, found in blocks.items() if source.stream == Stream.AUDIT}
    assert len(recounted) == study.finalists.count
    for index, votes in recounted.values():
        assert len({image for image, _, _ in index}) == study.base.data.validation
        assert 4 * study.base.data.validation < np.sum(votes) < 12 * study.base.data.validation
    certified = blocks.keys() - recounted.keys()
    assert len(certified) == 4  # two models, two streams
    for source in certified:
        index, votes = blocks[source]
        assert len({image for image, _, _ in index}) == settings.images
        assert np.sum(votes) == settings.images * wanted[source.stream]


def test_certificates_follow_from_sampling_one_image_at_a_time(finished: Run) -> None:
    """An independent CERTIFY of two test images by the winner gives the published rows."""
    torch.set_num_threads(1)
    study, name = load_study(finished.study), finished.result["winner"]
    with Ledger(finished.folder / "ledger.sqlite") as ledger:
        row = next(row for row in ledger.trials() if row.name == name)
    assert row.checkpoint
    classifier = load_finetuned(
        configuration(study, row.parameters), RunFolder(finished.folder).checkpoint(row.checkpoint)
    )
    base, settings = study.base, study.base.certification
    denoiser = load_denoiser(base.denoiser.family, base.denoiser.checkpoint, base.denoiser.config)
    test = load(base.data).test.first(settings.images)
    lines = (finished.folder / "certificates.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["idx", "label", "predict", "radius", "correct", "time"]
    for image, label, number, line in list(zip(test.images, test.labels, test.ids, lines[1:], strict=True))[:2]:
        counts = []
        for stream, n in ((Stream.SELECTION, settings.n0), (Stream.ESTIMATION, settings.n)):
            noise = gaussian(study.seed, stream, number.repeat(n), torch.arange(n), image.shape)
            with torch.inference_mode():
                votes = classifier(denoiser.denoise(image.expand(n, -1, -1, -1), noise, base.sigma)).argmax(1)
            counts.append([*torch.bincount(votes, minlength=10).tolist(), 0])
        predict, radius, _ = certify(counts[:1], counts[1:], settings.alpha, base.sigma)
        cells = line.split("\t")
        assert [int(cells[0]), int(cells[1]), int(cells[2])] == [int(number), int(label), int(predict[0])]
        assert float(cells[3]) == radius[0]
        assert int(cells[4]) == int(predict[0] == label)


def test_the_checkpoint_counted_is_the_one_that_is_kept(finished: Run) -> None:
    study, name = load_study(finished.study), finished.result["winner"]
    with Ledger(finished.folder / "ledger.sqlite") as ledger:
        row = next(row for row in ledger.trials() if row.name == name)
    assert row.checkpoint
    counted = {source.checkpoint for source in evidence(finished.folder)[1]}
    assert (
        model_identity(configuration(study, row.parameters), RunFolder(finished.folder).checkpoint(row.checkpoint))
        in counted
    )


def test_asked_again_it_says_that_it_is_done(finished: Run, cluster: Cluster) -> None:
    before = evidence(finished.folder)
    driver = cluster.tune(finished.study, "--out", finished.folder)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0
    assert "is done" in output
    assert evidence(finished.folder) == before


def wait_until(driver: subprocess.Popen[str], reached, limit: float = LIMIT) -> None:
    """Until ``reached()``; fails if the driver ends before."""
    deadline = time.monotonic() + limit
    while not reached():
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_and_interrupted_it_ends_with_the_same_counts(finished: Run, cluster: Cluster, tmp_path: Path) -> None:
    """SIGKILL and SIGTERM at random moments, and the rest as a job; SIGINT is what stops a job, in test_jobs."""
    folder, working = tmp_path / "run", tmp_path / "working"
    working.mkdir()
    study = write_study(working / "small.yaml", small_study())
    chance = random.Random(7)
    arguments: tuple = (study, "--out", folder)
    for number, epochs in ((signal.SIGKILL, 1), (signal.SIGTERM, 4)):
        driver = cluster.tune(*arguments)
        wait_until(driver, lambda epochs=epochs: epochs_recorded(folder) >= epochs)
        time.sleep(chance.uniform(0, 2))
        driver.send_signal(number)
        sent = time.monotonic()
        output, _ = driver.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert driver.returncode == -signal.SIGKILL
        else:
            assert time.monotonic() - sent < 15, output
            assert driver.returncode == 128 + number, output
            result = json.loads((folder / "result.json").read_text())
            assert (result["status"], result["exit_code"]) == ("interrupted", 128 + number)
            assert result["resume_command"] in output
        arguments = ("--resume", folder)
    command = ["ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", str(working), "--"]
    command += ["python", "-m", "cadis_ray.tune", "small.yaml", "--out", str(folder)]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert evidence(folder) == evidence(finished.folder)
