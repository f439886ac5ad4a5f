"""The pyfunc loads with the package it brings along, elsewhere, and counts what the smoothed classifier counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cadis_ray.results.export.smoothed import SmoothedClassifier, save_smoothed
from cadis_ray.study.load import load_study
from cadis_ray.study.study import changed
from tests.helpers.places import DIGITS

BASE = changed(load_study(DIGITS).base, {"finetuning.recipe": "none"})
ELSEWHERE = """
import json, sys
import mlflow, numpy as np
model = mlflow.pyfunc.load_model("model")
params = {"n0": 20, "n": 100, "alpha": 0.001, "seed": 3, "ids": [7, 1, 5, 3, 9]}
found = model.predict(np.load("images.npy"), params=params)
import cadis_ray
print(json.dumps({"from": cadis_ray.__file__, "found": found.to_dict("list")}))
"""


# Of MLflow's own classes, when its module is first imported.
@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")
def test_loaded_elsewhere_it_counts_the_same(tmp_path: Path) -> None:
    from cadis_ray.results.mlflow import pyfunc

    save_smoothed(tmp_path / "smoothed", BASE, BASE, None)
    card = tmp_path / "README.md"
    card.write_text("# Card\n")
    pyfunc.save(tmp_path / "model", tmp_path / "smoothed", card)
    assert not [path for path in (tmp_path / "model").rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    np.save(tmp_path / "images.npy", images)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert Path(answer["from"]).is_relative_to(tmp_path / "model")
    here = SmoothedClassifier.load(tmp_path / "smoothed").certify(
        images, [7, 1, 5, 3, 9], n0=20, n=100, alpha=0.001, seed=3
    )
    assert answer["found"]["selection"] == here.selection.tolist()
    assert answer["found"]["estimation"] == here.estimation.tolist()
    assert answer["found"]["radius"] == here.radius.tolist()
