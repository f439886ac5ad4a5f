"""The studies that come with the package: valid, and their base is what the paper used."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cadis_ray.study.load import load_study
from cadis_ray.study.plan import lines
from cadis_ray.study.study import Study
from tests.helpers.places import STUDIES

NAMES = sorted(path.stem for path in STUDIES.glob("*.yaml"))
# lambda, base learning rate, weight decay from and to, layer decay, radii doubled after: FT-CADIS, table 6.
CIFAR = {"025": (1, 5e-4, None), "050": (2, 5e-4, None), "100": (4, 1e-4, 10)}
IMAGENET = {"025": (2, 2e-4, 0.02, 0.2, 0.8), "050": (1, 4e-4, 0.01, 0.1, 0.9), "100": (2, 4e-4, 0.01, 0.1, 0.9)}
SIGMA = {"025": 0.25, "050": 0.5, "100": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the studies with stand-ins for the files that they name."""
    folder = tmp_path_factory.mktemp("studies")
    for name in NAMES:
        shutil.copy(STUDIES / f"{name}.yaml", folder)
        base = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())["base"]
        if path := base["data"].get("path"):
            for part in ("train/a", "train/b", "val/a", "val/b"):
                (folder / path / part).mkdir(parents=True, exist_ok=True)
                for number in range(3000 if part.startswith("train") else 600):
                    (folder / path / part / f"{number}.png").touch()
        for section in ("denoiser", "classifier"):
            checkpoint, model = base[section].get("checkpoint"), base[section].get("name", "")
            if checkpoint and not checkpoint.startswith("package:"):
                (folder / checkpoint).parent.mkdir(exist_ok=True)
                (folder / checkpoint).touch()
            if model.startswith("local-dir:"):
                hub = folder / model.removeprefix("local-dir:")
                hub.mkdir(exist_ok=True)
                (hub / "config.json").write_text(json.dumps({}))
                (hub / "model.safetensors").touch()
    return folder


@pytest.fixture
def study(folder: Path, request: pytest.FixtureRequest) -> Study:
    return load_study(folder / f"{request.param}.yaml")


@pytest.mark.parametrize("study", NAMES, indirect=True)
def test_every_study_is_valid_and_planned(study: Study) -> None:
    assert lines(study)[0].startswith(f"study {study.name}: {study.trials} trials")


@pytest.mark.parametrize("name", NAMES)
def test_every_study_says_what_it_asks_needs_and_costs(name: str) -> None:
    text = (STUDIES / f"{name}.yaml").read_text()
    header = text[: text.index("name:")]
    assert all(f"# {word}:" in header for word in ("Question", "Source", "Command"))
    assert f"{name}.yaml" in header
    assert len(text.splitlines()) <= 70
    assert yaml.safe_load(text)["name"] == name


@pytest.mark.parametrize("study", [f"cifar10_sigma{tag}" for tag in CIFAR], indirect=True)
def test_the_cifar_studies_start_from_the_papers_setting(study: Study) -> None:
    weight, rate, doubled = CIFAR[study.name[-3:]]
    base, tuning = study.base, study.base.finetuning
    assert base.sigma == SIGMA[study.name[-3:]]
    assert (tuning.adv_weight, tuning.base_lr, tuning.attack_radius_doubles_after) == (weight, rate, doubled)
    assert (tuning.attack_radius, tuning.num_noises, tuning.attack_steps) == (0.25, 4, 4)
    assert (tuning.epochs, tuning.last_epoch, tuning.warmup_epochs, tuning.batch_size) == (30, 20, 3, 128)
    assert (tuning.weight_decay, tuning.weight_decay_end, tuning.layer_decay) == (0.04, 0.4, 0.65)
    assert (tuning.clip, tuning.clip_norm, tuning.drop_path, tuning.adapter) == ("per_tensor", 0.3, 0.2, "full")
    assert (base.certification.n0, base.certification.n, base.certification.images) == (100, 100_000, 1000)
    assert study.baselines["paper"] == {}
    searched = {"adv_weight", "attack_radius", "num_noises", "lora.r"}
    assert {f"finetuning.{name}" for name in searched} <= set(study.space)


@pytest.mark.parametrize("study", [f"imagenet_sigma{tag}" for tag in IMAGENET], indirect=True)
def test_the_imagenet_studies_start_from_the_papers_setting(study: Study) -> None:
    weight, rate, first, last, layer = IMAGENET[study.name[-3:]]
    base, tuning = study.base, study.base.finetuning
    assert base.sigma == SIGMA[study.name[-3:]]
    assert (tuning.adv_weight, tuning.base_lr) == (weight, rate)
    assert (tuning.weight_decay, tuning.weight_decay_end, tuning.layer_decay) == (first, last, layer)
    assert (tuning.attack_radius, tuning.num_noises, tuning.attack_steps) == (0.25, 2, 1)
    assert (tuning.epochs, tuning.last_epoch, tuning.warmup_epochs, tuning.batch_size) == (10, 5, 1, 128)
    assert (tuning.adapter, tuning.lora.r, tuning.lora.lora_alpha) == ("lora", 4, None)
    assert (tuning.lora.target_modules, tuning.clip_norm, tuning.drop_path) == (("q", "v"), 1.0, 0.0)
    assert (base.certification.n, base.certification.images, base.data.test_subset) == (10_000, 1000, "per_class")
    assert study.baselines["paper"] == {}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cadis_ray", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.process
def test_studies_are_listed_shown_and_copied(tmp_path: Path) -> None:
    assert [line.split()[0] for line in run("ls").stdout.splitlines()] == NAMES
    text = (STUDIES / "digits.yaml").read_text()
    assert run("cat", "digits").stdout == text
    copy = tmp_path / "mine.yaml"
    assert run("cp", "digits", copy).returncode == 0
    assert copy.read_text() == text
    again = run("cp", "digits", copy)
    assert (again.returncode, "exists" in again.stderr) == (2, True)
    unknown = run("cat", "digit")
    assert unknown.returncode == 2
    assert "digits" in unknown.stderr
