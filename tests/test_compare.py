"""The command, on logs and on a run's folder as a study leaves it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from cadis_ray.certification.certificates import Certificates
from cadis_ray.compare import compare
from cadis_ray.errors import CadisError, IntegrityError, UsageError
from cadis_ray.results.comparison.compare import differences
from cadis_ray.results.comparison.sources import read_run, read_runs
from cadis_ray.results.records import records, write_result
from cadis_ray.results.report.page import write_report
from cadis_ray.results.study import StudyResult
from cadis_ray.search.trials import TrialResult
from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.folder import open_folder
from cadis_ray.study.load import load_study
from tests.helpers.places import DIGITS, ROOT, SHARED

COHEN = SHARED / "reference" / "cohen"
HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


def run(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(compare)
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def rows(*arguments: object) -> dict[str, Any]:
    made = json.loads(run(*arguments, "--format", "json"))
    assert isinstance(made, list)
    return {row["name"]: row for row in made}


def log(path: Path, *lines: tuple[int, int, int, float]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [
        f"{idx}\t{label}\t{predict}\t{radius}\t{int(label == predict)}\t0:00:01"
        for idx, label, predict, radius in lines
    ]
    path.write_text(HEADER + "\n".join(cells) + "\n")
    return path


def model(name: str, seed: int, shift: float) -> Certificates:
    generator = np.random.default_rng(seed)
    radius = np.maximum(0, generator.normal(0.4 + shift, 0.3, 50))
    label = np.arange(50) % 10
    predict = np.where(radius > 0, label, -1)
    predict[7] = 8
    votes = np.zeros((50, 11), int)
    return Certificates(
        name, "protocol", 0.5, 100, 400, 0.001, np.arange(50) * 3, label, predict, radius, predict == label,
        np.ones(50), votes, votes, np.full(50, 0.7),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    """A run's folder with a winner, two baselines, and a trial that failed."""
    source = DIGITS
    study = load_study(source)
    folder = tmp_path_factory.mktemp("runs") / "run"
    open_folder(study, source.read_text(), folder)

    def estimate(acr: float) -> Estimate:
        return Estimate(acr, 0.01, 0.9, dict.fromkeys(RADII, 0.777), 400, 400, 48)

    trials = [
        TrialResult(i, name, True, "complete", None, dict(changes), estimate(0.31))
        for i, (name, changes) in enumerate(study.baselines.items())
    ]
    drawn = {"finetuning.adv_weight": 2.5, "finetuning.attack_radius": 0.125, "finetuning.num_noises": 4}
    trials += [
        TrialResult(
            len(trials), "trial-0000", False, "complete", None, drawn | {"finetuning.lora.r": 8}, estimate(0.6)
        ),
        TrialResult(len(trials) + 1, "trial-0001", False, "failed", "<b>out of memory</b>", drawn, None),
    ]
    certificates = {name: model(name, 1 + i, 0.0) for i, name in enumerate(study.baselines)}
    certificates["trial-0000"] = model("trial-0000", 9, 0.2)
    result = StudyResult(study.name, folder, RADII, tuple(study.space), trials, "trial-0000", certificates)
    write_report(result)
    write_result(folder, {"status": "done", "exit_code": 0, "reason": None, "resume_command": "x"} | records(result))
    assert RunFolder(folder).study.exists()
    return folder, result


@pytest.mark.parametrize(
    ("name", "sigma", "acr", "abstained", "curve"),
    [
        ("cifar10_resnet110_noise_0.25_test_sigma_0.25", 0.25, 0.4289, None, {}),
        ("cifar10_resnet110_noise_0.50_test_sigma_0.50", 0.5, 0.5375, 83,
         {"0.0": 0.652, "0.25": 0.546, "0.5": 0.414, "0.75": 0.320, "1.0": 0.234, "1.5": 0.094}),
        ("imagenet_resnet50_noise_0.50_test_sigma_0.50", 0.5, 0.7325, None, {}),
    ],
)  # fmt: skip
def test_cohens_logs_give_their_known_values(name, sigma, acr, abstained, curve):
    if not COHEN.exists():
        pytest.skip("the published certification logs are not beside this checkout")
    row = rows("--logs", COHEN / f"{name}.tsv")[name]
    assert (row["sigma"], row["n_images"]) == (sigma, 500)
    assert row["acr"] == pytest.approx(acr, abs=5e-5)
    assert {r: row["certified_accuracy"][r] for r in curve} == pytest.approx(curve)
    assert abstained is None or row["abstained"] == abstained


def test_the_names_of_logs_tell_sigma_and_method(tmp_path: Path):
    line = (0, 3, 3, 0.6)
    known = {
        "net_noise_0.25_test_sigma_0.25.tsv": 0.25, "net_noise_0.50_test_sigma_0.5.tsv": 0.5,
        "x_sigma1.0_n100.tsv": 1.0, "sigma_0.12": 0.12, "noise_0.25.tsv": None, "sigmax.tsv": None, "sigma_0.tsv": None,
    }  # fmt: skip
    paths = [log(tmp_path / name, line) for name in known]
    assert [row["sigma"] for row in rows("--logs", *paths).values()] == list(known.values())
    assert {row["sigma"] for row in rows("--logs", *paths, "--sigma", 0.3).values()} == {0.3}
    text = run("--logs", *paths)
    assert "\nnet     0.25/0.5  " in text[text.index("Best over sigma") :]


def test_images_are_paired_by_their_index_whatever_their_order(tmp_path: Path):
    a = log(tmp_path / "a.tsv", (0, 3, 3, 0.6), (9, 4, 4, 0.2), (4, 1, -1, 0))
    b = log(tmp_path / "b.tsv", (4, 1, 1, 0.1), (0, 3, 3, 0.6), (9, 4, 4, 0.5))
    row = rows("--logs", a, b, "--baseline", "a")["b"]
    assert row["difference"]["mean"] == pytest.approx((0.1 + 0 + 0.3) / 3)
    assert row["difference"]["low_95"] < row["difference"]["mean"] < row["difference"]["high_95"]
    assert rows("--logs", a, b)["b"]["difference"] is None


def test_radii_are_chosen_and_reaching_one_exactly_counts(tmp_path: Path):
    path = log(tmp_path / "a.tsv", (0, 3, 3, 0.3), (1, 3, 3, 0.2), (2, 3, -1, 0.0))
    (row,) = rows("--logs", path, "--radii", "0,.3").values()
    assert row["certified_accuracy"] == pytest.approx({"0.0": 2 / 3, "0.3": 1 / 3})
    assert list(rows("--logs", path)["a"]["certified_accuracy"]) == [str(0.25 * i) for i in range(7)]


def test_a_run_shows_certificates_estimates_and_differences_to_its_first_baseline(finished):
    folder, result = finished
    made = rows(folder)
    assert list(made) == [trial["name"] for trial in records(result)["table"]]
    first = result.trials[0].name
    for name, c in result.certificates.items():
        row = made[name]
        assert row["acr"] == np.mean(c.radius * c.correct)
        assert (row["n_images"], row["sigma"], row["protocol"]["n"]) == (50, 0.5, 400)
        assert list(row["certified_accuracy"]) == [str(r) for r in RADII]
        assert row["winner"] == (name == "trial-0000")
        assert (row["difference"] is None) == (name == first)
    gap = made["trial-0000"]["difference"]
    mine, theirs = result.certificates["trial-0000"], result.certificates[first]
    assert gap["baseline"] == first
    assert gap["mean"] == pytest.approx(np.mean(mine.radius * mine.correct) - np.mean(theirs.radius * theirs.correct))
    assert made["trial-0001"]["acr"] is made["trial-0001"]["estimate"] is None
    assert made["trial-0000"]["parameters"]["finetuning.lora.r"] == 8
    assert made["trial-0001"]["parameters"]["finetuning.lora.r"] == 4  # what it did not draw is the base's
    assert made["off_the_shelf"]["parameters"]["finetuning.lora.r"] is None  # nothing was trained
    assert "finetuning.epochs" not in made["trial-0000"]["parameters"]  # the same for all
    text = run(folder)
    certificates, estimates = text.split("Estimates, not certificates")
    assert "77.7" not in certificates
    assert "trial-0001 failed: <b>out of memory</b>" in estimates


def test_models_of_several_runs_are_told_apart_and_have_one_baseline(finished):
    folder, result = finished
    one = {row.name: row for row in read_run(folder).models}
    both = read_runs("mine", {"a": folder, "b": folder})
    assert [model.name for model in both.models] == [f"{run}/{name}" for run in "ab" for name in one]
    assert (both.dataset, both.winner, both.baseline) == ("digits", None, f"a/{result.trials[0].name}")
    gaps = differences(both)
    assert gaps[f"b/{result.trials[0].name}"].mean == 0
    assert gaps["a/trial-0000"].mean == gaps["b/trial-0000"].mean > 0


def test_changed_certificates_are_found_out(finished, tmp_path: Path):
    folder, result = finished
    copy = tmp_path / "copy"
    for path in folder.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(folder)).write_bytes(path.read_bytes())
    rows(copy)
    target = copy / "certificates" / "trial-0000.tsv"
    c = result.certificates["trial-0000"]
    best = repr(float(c.radius.max()))
    target.write_text(target.read_text().replace(best, "1.9"))
    with pytest.raises(IntegrityError, match=r"trial-0000\.tsv: its ACR is not that of result\.json"):
        run(copy)


@pytest.mark.parametrize("format", ["table", "markdown", "latex", "html"])
def test_published_figures_have_a_block_of_their_own_that_says_why_not_to_compare(finished, format: str):
    text = run(finished[0], "--published", "cifar-10", "--format", format)
    certificates, _, figures = text.partition("Published figures on CIFAR-10")
    assert "PEFTSmoothing" not in certificates
    assert "PEFTSmoothing" in figures
    assert "trial-0000" in certificates
    assert "trial-0000" not in figures
    assert "certified on digits, not on" in figures


def test_json_keeps_published_figures_apart(finished):
    made = json.loads(run(finished[0], "--published", "CIFAR-10", "--format", "json"))
    assert made["rows"] == list(rows(finished[0]).values())
    assert len(made["published"]) == 458
    assert made["published"][0] == {
        "source": "FT-CADIS (arXiv 2411.08933)", "table": "1a", "dataset": "CIFAR-10", "method": "PixelDP",
        "setup": "RS", "sigma": "best of 0.25/0.50/1.00", "metric": "certified_accuracy", "radius": "0.25",
        "value": 22.0, "clean_accuracy": 71.0, "note": "",
    }  # fmt: skip
    assert any("no figure here compares" in note for note in made["notes"])


def test_hostile_names_are_harmless_in_every_format(tmp_path: Path):
    name = "<script>alert(1)</script> | .. 100% a_b & \x1b[31m".replace("/", "\u2215")
    path = log(tmp_path / f"{name}.tsv", (0, 3, 3, 0.6), (1, 3, 3, 0.4))
    made = {format: run("--logs", path, "--format", format) for format in ("table", "markdown", "latex", "html")}
    assert all("\x1b" not in text for text in made.values())
    assert "<script" not in made["markdown"] + made["latex"] + made["html"]
    assert r"\| .. 100% a\_b &amp;" in made["markdown"]
    assert r"\textbar{} .. 100\% a\_b \& {[}31m" in made["latex"]
    assert list(rows("--logs", path)) == [name]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_page_goes_to_a_file_and_holds_both_figures(tmp_path: Path):
    path = log(tmp_path / "sigma_0.5.tsv", (0, 3, 3, 0.6), (1, 3, 3, 0.4))
    said = run("--logs", path, "--format", "html", "--out", tmp_path / "deep" / "c.html")
    assert said.split() == ["written", "to", str(tmp_path / "deep" / "c.html")]
    page = (tmp_path / "deep" / "c.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2
    assert not any(scheme in page for scheme in ("http:", "https:"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.tsv", "a.tsv", "--logs"], "given twice"),
        (["a.tsv", "b.tsv"], "give one, or --logs"),
        (["."], "not a run's folder"),
        ([".", "--experiment", "digits"], "give one, or --logs with certification logs, or --experiment"),
        ([".", "--runs", "a"], "names runs of an --experiment"),
        (["a.tsv", "--logs", "--radii", "0,x"], "--radii: got '0,x'"),
        (["a.tsv", "--logs", "--radii", "0.5,.5"], "different numbers"),
        (["a.tsv", "--logs", "--radii", "nan"], "--radii"),
        (["a.tsv", "--logs", "--radii=-1"], "--radii"),
        (["a.tsv", "--logs", "--sigma", "0"], "--sigma: got 0"),
        ([".", "--sigma", "0.5"], "a run has its own"),
        (["a.tsv", "--logs", "--baseline", "c"], "'c' has no certificates; give one of a"),
        (["a.tsv", "--logs", "--published", "MNIST"], "got 'MNIST'; there are figures for CIFAR-10, ImageNet"),
    ],
)
def test_wrong_use_is_refused_with_a_reason(tmp_path: Path, monkeypatch, arguments: list[str], message: str):
    log(tmp_path / "a.tsv", (0, 3, 3, 0.6))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        run(*arguments)


def test_an_unfinished_run_says_how_to_finish_it(finished, tmp_path: Path):
    open_folder(load_study(DIGITS), "", tmp_path / "run")
    with pytest.raises(UsageError, match=r"result\.json: cannot be read"):
        run(tmp_path / "run")
    write_result(tmp_path / "run", {"status": "interrupted", "resume_command": "python -m cadis_ray.tune --resume x"})
    with pytest.raises(UsageError, match="interrupted, nothing to compare; finish it: python -m"):
        run(tmp_path / "run")


def test_what_certify_wrote_is_compared_too(finished, tmp_path: Path):
    folder, result = finished
    study = load_study(DIGITS)
    held = {"configuration": study.base.model_dump(mode="json"), "checkpoint": None}
    request = {"base": held["configuration"], "seed": 0, "models": {"off_the_shelf": held, "trial-0000": held}}
    (tmp_path / "certificates").mkdir()
    (tmp_path / "certificates" / "request.json").write_text(json.dumps(request))
    with pytest.raises(CadisError, match="off_the_shelf is not certified yet"):
        run(tmp_path)
    for name in request["models"]:
        (tmp_path / "certificates" / f"{name}.tsv").write_bytes((folder / "certificates" / f"{name}.tsv").read_bytes())
    made = rows(tmp_path, "--baseline", "off_the_shelf")
    assert {name: row["acr"] for name, row in made.items()} == {
        name: np.mean(c.radius * c.correct) for name, c in result.certificates.items() if name in request["models"]
    }
    assert made["trial-0000"]["difference"]["baseline"] == "off_the_shelf"
    assert list(made["trial-0000"]["certified_accuracy"]) == [str(r) for r in study.base.certification.radii]


@pytest.mark.process
def test_help_answers_at_once():
    slow = ("torch", "ray", "mlflow", "numpy", "scipy", "matplotlib")
    code = f"import sys, cadis_ray.compare; print(*[name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.process
def test_a_user_error_is_a_message_and_an_exit_code_without_a_traceback(tmp_path: Path):
    bad = tmp_path / "bad.tsv"
    bad.write_text(HEADER + "0\t3\t3\tx\t1\t0\n")
    command = [sys.executable, "-m", "cadis_ray.compare", "--logs", str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 5
    assert done.stderr.startswith(f"{bad}:2: radius is 'x'")
    assert "Traceback" not in done.stderr
