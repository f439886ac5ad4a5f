"""Is a study that was killed again and again the undisturbed one?

    python benchmarks/resume.py [STUDY.yaml] [--kills 10] [--seed 0] [--scheduler racing] [--folder FOLDER]

Runs the study once in peace, then again, killed with SIGKILL at random moments of the first run's length and resumed;
before each resume Tune's snapshot is left, truncated or removed by lot. Prints JSON: when it was killed, what became of
the snapshot, and whether trials, their states and counts, and every block of votes are equal. Some minutes a kill.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from cadis_ray.ledger import Ledger
from cadis_ray.smoothing.counts import CountsStore

DIGITS = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", type=Path, help="default: the digits, made small")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scheduler", default="racing", choices=("none", "asha", "racing"), help="of the default study"
    )
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="resume-"))
    study = arguments.study or small_study(folder / "study.yaml", arguments.scheduler)
    started = time.monotonic()
    subprocess.run(command(study, "--out", folder / "undisturbed"), check=True, stdout=subprocess.DEVNULL)
    length = time.monotonic() - started
    chance, killed = random.Random(arguments.seed), []
    run = folder / "killed"
    for _ in range(arguments.kills):
        moment, driver = chance.uniform(5, length), subprocess.Popen(command(study, "--out", run))
        time.sleep(moment)
        if driver.poll() is None:
            driver.send_signal(signal.SIGKILL)
        driver.wait()
        killed.append((round(moment, 1), spoil(run / "tune", chance.choice(("left", "truncated", "removed")))))
    subprocess.run(command(study, "--out", run), check=True, stdout=subprocess.DEVNULL)
    one, other = evidence(folder / "undisturbed"), evidence(run)
    equal = {f"same_{name}": one[name] == other[name] for name in one}
    states = [state for _, state, *_ in one["trials"].values()]
    print(json.dumps({"seconds": round(length), "killed": killed, "states": states, **equal}))


def command(study: Path, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "cadis_ray.tune", str(study), *map(str, arguments), "--address", "local"]


def small_study(path: Path, scheduler: str) -> Path:
    """The digits with six short trials."""
    study = yaml.safe_load(DIGITS.read_text())
    study |= {"name": "resumed", "trials": 6, "sampler": {"name": "tpe", "startup": 2}}
    study["base"]["finetuning"] |= {"epochs": 3, "attack_steps": 1}
    study["base"]["validation"] = {"images": 400, "samples": [8, 24]}
    study["base"]["certification"] |= {"images": 40, "n": 120, "radii": [0, 0.25]}
    study["finalists"] = {"count": 2, "samples": 16}
    study["scheduler"] = {"name": scheduler}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(study))
    return path


def spoil(tune: Path, how: str) -> str:
    """Truncate every file of Tune's folder to half, or remove the folder."""
    if how == "removed":
        shutil.rmtree(tune, ignore_errors=True)
    if how == "truncated":
        for path in (path for path in tune.rglob("*") if path.is_file()):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return how


def evidence(run: Path) -> dict[str, Any]:
    """Trials with their states, parameters and counts; every block of votes; the winner."""
    with Ledger(run / "ledger.sqlite") as ledger:
        trials = {
            row.name: (row.number, row.state, row.parameters, [(e.epoch, e.counts.tolist()) for e in epochs])
            for row in ledger.trials()
            for epochs in [ledger.epochs(row.number)]
        }
    blocks = CountsStore(run / "counts").load()
    votes = {source: (found.index.tolist(), found.votes.tolist()) for source, found in blocks.items()}
    return {"trials": trials, "votes": votes, "winner": json.loads((run / "result.json").read_text())["winner"]}


if __name__ == "__main__":
    main()
