"""Does the pyfunc of a run's winner count the same in an environment made of nothing but its own requirements?

Command: python benchmarks/fresh_environment.py RUN [--images 5] [--n 400]

Exports the winner for MLflow, makes a virtual environment with uv from the model's requirements.txt (gigabytes,
minutes), loads the model there, outside any checkout, and certifies the first test images. Prints JSON; exits 1 where
the votes are not those that this program's actor counts. With --keep FOLDER the environment stays.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cadis_ray.certification.counting import Count
from cadis_ray.certification.request import Model, Request, certified_images
from cadis_ray.results.mlflow.models import write_pyfunc
from cadis_ray.results.read import read_result
from cadis_ray.smoothing.noise import Stream
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.study import changed, configuration, read_study

N0 = 100
LOADED = """
import json, sys, mlflow, numpy as np
model = mlflow.pyfunc.load_model("model")
found = model.predict(np.load("images.npy"), params=json.loads(sys.argv[1]))
import cadis_ray
print(json.dumps({"from": cadis_ray.__file__, "python": sys.executable, **found.to_dict("list")}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = compare(given.run, given.images, given.n, folder)
    print(json.dumps(report, indent=2))
    return 0 if report["equal"] else 1


def compare(run: Path, images: int, n: int, folder: Path) -> dict[str, object]:
    """Votes of the engine here and of the pyfunc there, for the same images, ids and seed."""
    study = read_study(run)
    with RunFolder(run).open_ledger() as ledger:
        result = read_result(study, run, ledger)
        row = next(row for row in ledger.trials() if row.name == result.winner)
    write_pyfunc(folder / "model", study, result, row)
    base = changed(study.base, {"certification.images": images, "certification.n0": N0, "certification.n": n})
    test, _ = certified_images(base)
    model = Model(
        configuration(study, row.parameters), RunFolder(run).checkpoint(row.checkpoint) if row.checkpoint else None
    )
    count = Count(Request(base, {row.name: model}, study.seed), 64, "cpu", 1)
    item = {"rows": np.arange(images), "models": [row.name], "start": 0, "block": n}
    sizes = {Stream.SELECTION: N0, Stream.ESTIMATION: n}
    here = {s.name: next(iter(count(item | {"stream": int(s), "size": k})))["votes"][0] for s, k in sizes.items()}

    began = time.monotonic()
    fresh(folder)
    made = time.monotonic() - began
    np.save(folder / "images.npy", test.images.numpy().transpose(0, 2, 3, 1))
    params = {"n0": N0, "n": n, "alpha": base.certification.alpha, "seed": study.seed, "ids": test.ids.tolist()}
    there = json.loads(inside(folder, "-c", LOADED, json.dumps(params)).splitlines()[-1])
    votes = {name: there[name.lower()] for name in here}
    assert Path(there["from"]).is_relative_to(folder.resolve() / "model"), there["from"]
    return {
        "model": row.name, "images": test.ids.tolist(), "n0": N0, "n": n, "sigma": base.sigma,
        "equal": all(votes[name] == here[name].tolist() for name in here),
        "votes_that_differ": {name: int(np.abs(np.array(votes[name]) - here[name]).sum() // 2) for name in here},
        "predict": there["predict"], "radius": there["radius"],
        "environment_seconds": round(made, 1), "packages": len(json.loads(uv(folder, "list", "--format", "json"))),
    }  # fmt: skip


def fresh(folder: Path) -> None:
    """A virtual environment at ``folder/venv`` with the model's own requirements and nothing else."""
    wanted = (folder / "model" / "python_env.yaml").read_text()
    version = next(line.split(":")[1].strip() for line in wanted.splitlines() if line.startswith("python:"))
    done = subprocess.run([UV, "venv", "--quiet", "--python", version, str(folder / "venv")], capture_output=True)
    if done.returncode:  # that very patch release is not installed
        subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, str(folder / "venv")], check=True)
    uv(folder, "install", "--quiet", "-r", str(folder / "model" / "requirements.txt"))


UV = str(Path(sys.executable).parent / "uv")


def uv(folder: Path, command: str, *arguments: str) -> str:
    full = [UV, "pip", command, "--python", str(folder / "venv" / "bin" / "python"), *arguments]
    return subprocess.run(full, check=True, stdout=subprocess.PIPE, text=True).stdout


def inside(folder: Path, *arguments: str) -> str:
    """The output of the environment's Python, started in ``folder`` without this checkout on its path."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str((folder / "venv" / "bin" / "python").absolute()), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
