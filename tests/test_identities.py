"""What names a run, a model and a vote stays what it is: files that were made yesterday are found by it."""

import json
from pathlib import Path

import pytest
import yaml

from cadis_ray.finetuning.base_classifier import base_identity, view_identity, view_of
from cadis_ray.study.folder import fingerprint
from cadis_ray.study.load import load_study
from cadis_ray.study.study import Study, configuration

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in (HERE / "identities").glob("*.yaml"))
PINNED = json.loads((HERE / "identities.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The frozen studies, with stand-ins for the files that they name: the name as content."""
    folder = tmp_path_factory.mktemp("frozen")
    for name in NAMES:
        text = (HERE / "identities" / f"{name}.yaml").read_text()
        (folder / f"{name}.yaml").write_text(text)
        base = yaml.safe_load(text)["base"]
        files = [base[section].get("checkpoint") for section in ("denoiser", "classifier")]
        hub = base["classifier"].get("name", "").partition("local-dir:")[2]
        files += [f"{hub}/{file}" for file in ("config.json", "model.safetensors") if hub]
        for file in files:
            if file and not file.startswith("package:"):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(file)
        for part in ("train/a", "val/a"):
            (folder / (base["data"].get("path") or "none") / part).mkdir(parents=True, exist_ok=True)
    return folder


def identities(study: Study) -> dict:
    data = study.base.data.model_copy(update={"path": study.base.data.path and "DATA"})
    study = study.model_copy(update={"base": study.base.model_copy(update={"data": data})})
    chosen = {name: configuration(study, changes) for name, changes in study.baselines.items()}
    return {
        "fingerprint": fingerprint(study),
        "models": {name: base_identity(one, None) for name, one in chosen.items()},
        "views": {name: view_identity(study.base, view_of(one)) for name, one in chosen.items()},
    }


@pytest.mark.parametrize("name", NAMES)
def test_identities_are_those_that_were_pinned(name: str, folder: Path) -> None:
    assert identities(load_study(folder / f"{name}.yaml")) == PINNED[name]
