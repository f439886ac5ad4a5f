"""``python -m cadis_ray.tune STUDY.yaml``: search, then certify the winner."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from cadis_ray.errors import IntegrityError, UsageError
from cadis_ray.interface.command import command


def tune(
    study: Annotated[Path | None, typer.Argument(help="The study file.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="Finish the run in this folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/NAME-HASH.")] = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster; 'local' starts one on this machine.")
    ] = "local",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")
    ] = False,
    hardware: Annotated[
        str | None, typer.Option(metavar="KIND=COUNT", help="With --dry-run: predict time, storage and price, h200=8.")
    ] = None,
) -> None:
    """Search fine-tuning hyperparameters for the largest average certified radius, then certify the winner.

    Examples:

      python -m cadis_ray.tune search_spaces/digits.yaml

      python -m cadis_ray.tune search_spaces/digits.yaml --dry-run --hardware cpu=2

      python -m cadis_ray.tune --resume runs/digits-1a2b3c4d

      ray job submit --working-dir . -- python -m cadis_ray.tune search_spaces/digits.yaml

    The same study finds its run again: it is resumed, or said to be done.
    """
    if (study is None) == (resume is None):
        raise UsageError("give a study file, or --resume RUN_DIR, and not both")
    if address == "auto":
        raise UsageError("--address auto: would take whatever cluster is found; give 'local' or HOST:PORT")
    if hardware and not dry_run:
        raise UsageError("--hardware: predicts what a study takes; give --dry-run with it")
    if out is not None and re.match(r"[a-z][a-z0-9+.-]+:/", str(out)):
        raise UsageError(f"--out {out}: must be a folder, not a URI: its ledger is a SQLite file; mount what is shared")
    from cadis_ray.study import forecast
    from cadis_ray.study.folder import default_folder, open_folder
    from cadis_ray.study.load import load_study
    from cadis_ray.study.plan import lines, plan
    from cadis_ray.study.study import read_study

    if study is not None:
        chosen = load_study(study)
        run_dir = out or default_folder(chosen)
    else:
        assert resume is not None
        chosen, run_dir = read_study(resume), resume
    if dry_run:
        told = lines(plan(chosen))
        if hardware:
            told += forecast.lines(forecast.forecast(chosen, *forecast.parse_hardware(hardware)))
        print("\n".join([*told, f"run folder: {run_dir}"]))
        return
    if study is not None:
        open_folder(chosen, study.read_text(), run_dir)
    if ended := _ended(run_dir):
        print(ended)
        return
    from cadis_ray.engine.run import run

    code = run(chosen, run_dir, address)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: what Ray and MLflow leave at exit could keep an interrupted process beyond its grace period.
    os._exit(int(code))


def _ended(run_dir: Path) -> str | None:
    """What to say of a run that is done."""
    from cadis_ray.storage.run_folder import RunFolder

    folder = RunFolder(run_dir)
    try:
        result = folder.ending()
    except IntegrityError:
        return None
    if result.get("status") != "done":
        return None
    return f"{run_dir} is done; its winner is {result['winner']}. Report: {folder.report_html}"


if __name__ == "__main__":
    command(tune)
