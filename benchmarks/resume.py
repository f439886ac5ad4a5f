"""Is a study that was killed again and again the undisturbed one?

    python benchmarks/resume.py [STUDY.yaml] [--kills 10] [--seed 0] [--scheduler racing] [--folder FOLDER]

Runs the study once in peace, then again, killed with SIGKILL at random moments of the first run's length and resumed
until it is done, and so on with new runs until there were as many kills; before each resume Tune's snapshot is left,
truncated or removed by lot. Prints JSON: when each run was killed, what became of the snapshot, and whether the trials
of all, their states and counts, and every block of votes are equal.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from cadis_ray.smoothing.counts import CountsStore
from cadis_ray.storage.ledger import Ledger

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
    chance, runs = random.Random(arguments.seed), []
    undisturbed = evidence(folder / "undisturbed")
    equal = dict.fromkeys(undisturbed, True)
    while (left := arguments.kills - sum(map(len, runs))) > 0:
        run = folder / f"killed-{len(runs)}"
        runs.append(killed(study, run, left, length, chance))
        found = evidence(run)
        equal = {name: same and found[name] == undisturbed[name] for name, same in equal.items()}
    states = [state for _, state, *_ in undisturbed["trials"].values()]
    same = {f"same_{name}": value for name, value in equal.items()}
    print(json.dumps({"seconds": round(length), "killed": runs, "states": states, **same}))


def killed(study: Path, run: Path, kills: int, length: float, chance: random.Random) -> list[tuple[float, str]]:
    """Kill and resume a run, at most ``kills`` times, until it is done; gives the seconds and the snapshot's fate."""
    found = []
    while True:
        moment = chance.uniform(5, length)
        driver = subprocess.Popen(command(study, "--out", run), stdout=subprocess.DEVNULL)
        try:
            if code := driver.wait(timeout=moment if len(found) < kills else None):
                sys.exit(f"a resumed run ended with {code}")
            return found
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()
        found.append((round(moment, 1), spoil(run / "tune", chance.choice(("left", "truncated", "removed")))))


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
