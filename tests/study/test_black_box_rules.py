"""A study of black boxes says what to ask, and its dry run says so where it does not."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cadis_ray.errors import UsageError
from cadis_ray.study.load import load_study
from tests.helpers.places import STUDIES

STUDY = yaml.safe_load((STUDIES / "systems_digits.yaml").read_text())


def load(tmp_path: Path, **black_box: Any) -> None:
    raw = STUDY | {"base": STUDY["base"] | {"black_box": black_box}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw))
    load_study(tmp_path / "study.yaml")


def test_every_recipe_is_drawn_and_a_baseline_of_its_own() -> None:
    drawn = set(STUDY["space"]["finetuning.recipe"]["choices"]) | {"none"}
    assert {changes.get("finetuning.recipe", "ft_cadis") for changes in STUDY["baselines"].values()} == drawn
    adapters = {changes.get("finetuning.adapter", "full") for changes in STUDY["baselines"].values()}
    assert adapters == {"full", "lora", "prompt", "series"}


def test_an_endpoint_and_its_classes_are_asked_for(tmp_path: Path) -> None:
    load(tmp_path, endpoint="m:f", classes=10)
    with pytest.raises(UsageError) as caught:
        load(tmp_path)
    lines = str(caught.value).splitlines()
    assert any("baselines.black_box.black_box.endpoint: missing" in line for line in lines)
    assert any("black_box.classes: missing" in line for line in lines)
    with pytest.raises(UsageError, match="holds a password"):
        load(tmp_path, endpoint="https://me:secret@host/", classes=10)
