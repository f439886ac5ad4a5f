"""The smoothed classifier as an MLflow pyfunc, made from code: MLflow runs this file, and nothing is pickled.

The model brings this package along (``code_paths``) and needs no other checkout of it.
"""

import json
import shutil
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.models import Model, ModelSignature, set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

from cadis_ray.errors import UsageError
from cadis_ray.results.export.smoothed import RECORD, SmoothedClassifier
from cadis_ray.results.mlflow.store import quiet

ARTIFACT, CARD = "smoothed", "card"
PACKAGES = ("mlflow", "torch", "torchvision", "timm", "peft", "transformers", "huggingface_hub", "safetensors",
            "scipy", "numpy", "pandas", "pyyaml", "pydantic", "typer", "rich")  # fmt: skip
FRESH = -1  # a signature's parameter has a default that is a number

# Without inputs: MLflow's tensors have one type, and these images have two. ``smoothed.as_tensor`` checks them.
SIGNATURE = ModelSignature(
    outputs=Schema(
        [
            ColSpec(DataType.long, "predict"),
            ColSpec(DataType.double, "radius"),
            ColSpec(DataType.double, "p_a_lower"),
            ColSpec(Array(DataType.long), "selection"),
            ColSpec(Array(DataType.long), "estimation"),
        ]
    ),
    params=ParamSchema(
        [
            ParamSpec("n0", DataType.long, 100),
            ParamSpec("n", DataType.long, 10_000),
            ParamSpec("alpha", DataType.double, 0.001),
            ParamSpec("seed", DataType.long, FRESH),
            ParamSpec("ids", DataType.long, [], shape=(-1,)),
        ]
    ),
)


class SmoothedModel(PythonModel):
    """Images (N, H, W, C), uint8 or floating in [0, 1], to a frame of N rows: predict, radius, p_a_lower, counts."""

    smoothed: SmoothedClassifier

    def load_context(self, context: PythonModelContext) -> None:
        self.smoothed = SmoothedClassifier.load(context.artifacts[ARTIFACT])

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Certify images with ``n0``, ``n``, ``alpha``, ``seed`` (-1: fresh) and ``ids`` (none: 0, 1, ...)."""
        given = {"n0": 100, "n": 10_000, "alpha": 0.001, "seed": FRESH, "ids": []} | (params or {})
        ids, seed = np.asarray(given["ids"], np.int64), int(given["seed"])
        found = self.smoothed.certify(
            model_input,
            ids if len(ids) else None,
            n0=int(given["n0"]),
            n=int(given["n"]),
            alpha=float(given["alpha"]),
            seed=None if seed == FRESH else seed,
        )
        return pd.DataFrame(
            {
                "predict": found.predict,
                "radius": found.radius,
                "p_a_lower": found.p_a_lower,
                "selection": found.selection.tolist(),
                "estimation": found.estimation.tolist(),
            }
        )


def requirements() -> list[str]:
    """What the model needs, pinned to what is installed here."""
    return [f"{name}=={version(name).split('+')[0]}" for name in PACKAGES]


def save(path: Path, smoothed: Path, card: Path, described: Model | None = None) -> None:
    """Write the pyfunc of a folder of ``save_smoothed`` to ``path``, which must not exist.

    ``described``: the run and the logged model that it is in a store.
    """
    if path.exists():
        raise UsageError(f"{path} exists; give another --out")
    quiet()
    mlflow.pyfunc.save_model(path=str(path), mlflow_model=described or Model(), **_model(smoothed, card))
    for compiled in path.rglob("__pycache__"):  # of this Python, not of the one that loads the model
        shutil.rmtree(compiled)


def _model(smoothed: Path, card: Path) -> dict[str, Any]:
    record = json.loads((smoothed / RECORD).read_text())
    channels, height, width = record["image_shape"] or (record["channels"], 32, 32)
    example = np.zeros((1, height, width, channels), np.uint8)
    return {
        "input_example": (example, {"n0": 10, "n": 100, "alpha": 0.001}),
        "python_model": str(Path(__file__).resolve()),
        "artifacts": {ARTIFACT: str(smoothed), CARD: str(card)},
        "code_paths": [str(files("cadis_ray"))],
        "signature": SIGNATURE,
        "pip_requirements": requirements(),
    }


set_model(SmoothedModel())
