"""``python -m cadis_ray.tune STUDY.yaml``: search, then certify the winner."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cadis_ray.errors import UsageError
from cadis_ray.interface.command import command

if TYPE_CHECKING:
    from cadis_ray.study.study import Study


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
    if hardware and not dry_run:
        raise UsageError("--hardware: predicts what a study takes; give --dry-run with it")
    from cadis_ray.storage.run_folder import RunFolder
    from cadis_ray.study import forecast
    from cadis_ray.study.folder import check_place, default_folder, done, open_folder
    from cadis_ray.study.load import load_study
    from cadis_ray.study.plan import lines
    from cadis_ray.study.study import read_study

    check_place(out, address)
    if study is not None:
        chosen = load_study(study)
        run_dir = out or default_folder(chosen)
    else:
        assert resume is not None
        chosen, run_dir = read_study(resume), resume
    if dry_run:
        told = lines(chosen)
        if hardware:
            told += forecast.lines(forecast.forecast(chosen, *forecast.parse_hardware(hardware)))
        print("\n".join([*told, f"run folder: {run_dir}"]))
        return
    if study is not None:
        open_folder(chosen, study.read_text(), run_dir)
    if result := done(run_dir):
        print(f"{run_dir} is done; its winner is {result['winner']}. Report: {RunFolder(run_dir).report_html}")
        return
    _run(chosen, run_dir, address)


def _run(study: "Study", run_dir: Path, address: str) -> None:
    from cadis_ray.engine.run import run

    code = run(study, run_dir, address)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: what Ray and MLflow leave at exit could keep an interrupted process beyond its grace period.
    os._exit(int(code))


if __name__ == "__main__":
    command(tune)
