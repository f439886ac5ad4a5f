"""What names a run, a model and a vote stays what it is: files that were made yesterday are found by it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml

from cadis_ray.finetuning.base_classifier import base_identity, view_identity, view_of
from cadis_ray.interface.section import Section
from cadis_ray.models.settings import Denoiser
from cadis_ray.study.folder import default_folder, fingerprint, open_folder, whole_fingerprint
from cadis_ray.study.load import load_study
from cadis_ray.study.study import Study, changed, configuration
from tests.helpers.places import ROOT

HERE = ROOT / "tests"
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


def identities(study: Study, whole: bool) -> dict:
    data = study.base.data.model_copy(update={"path": study.base.data.path and "DATA"})  # in whole sections it counts
    study = study.model_copy(update={"base": study.base.model_copy(update={"data": data})})
    chosen = {name: configuration(study, changes) for name, changes in study.baselines.items()}
    return {
        "fingerprint": whole_fingerprint(study) if whole else fingerprint(study),
        "models": {name: base_identity(one, None, whole=whole) for name, one in chosen.items()},
        "views": {name: view_identity(study.base, view_of(one), whole=whole) for name, one in chosen.items()},
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", PINNED)
def test_identities_are_those_that_were_pinned(name: str, kind: str, folder: Path) -> None:
    found = identities(load_study(folder / f"{name}.yaml"), kind == "whole")
    assert found == PINNED[kind][name], "raise VERSION of the section whose meaning changed, or keep its default"


def sections(model: type[Section]) -> Iterator[type[Section]]:
    yield model
    for field in model.model_fields.values():
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from sections(inner)


@pytest.mark.process
def test_a_new_key_with_a_default_in_every_section_changes_no_identity(
    folder: Path,
) -> None:
    """Run in a process of its own, because pydantic's classes are changed."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import pydantic
from pydantic.fields import FieldInfo
from cadis_ray.interface.section import Section
from cadis_ray.study.sections import Distribution
from tests.test_identities import NAMES, PINNED, Study, identities, sections
everything = [*dict.fromkeys(sections(Study)), Distribution]
assert len(everything) > 15, everything
for section in reversed(everything):
    for field in section.model_fields.values():
        if isinstance(field.default, Section):
            field.default = type(field.default)()
    section.model_fields["added_later"] = FieldInfo(annotation=bool, default=False)
    section.model_rebuild(force=True)
from cadis_ray.study.load import load_study
for name in NAMES:
    study = load_study(Path({str(folder)!r}) / (name + ".yaml"))
    assert study.base.denoiser.added_later is False
    assert identities(study, False) == PINNED["now"][name], name
    assert identities(study, True) == PINNED["whole"][name], name
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


def test_a_raised_version_and_another_value_change_the_identity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(folder / "digits.yaml")
    before = identities(study, False)
    other = changed(study.base, {"finetuning.base_lr": 0.1})
    assert fingerprint(study.model_copy(update={"base": other})) != before["fingerprint"]
    monkeypatch.setattr(Denoiser, "VERSION", 2)
    after = identities(study, False)
    assert after["fingerprint"] != before["fingerprint"]
    assert after["views"] != before["views"]
    assert after["models"] == before["models"]
    assert identities(study, True) == PINNED["whole"]["digits"]


def test_a_run_is_found_by_its_former_name_until_there_is_one_by_the_new(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = load_study(folder / "digits.yaml")
    now, before = (tmp_path / "runs" / f"digits-{made_of(study)[:8]}" for made_of in (fingerprint, whole_fingerprint))
    assert default_folder(study) == now
    open_folder(study, "", before)
    assert default_folder(study) == before
    open_folder(study, "", now)
    assert default_folder(study) == now
