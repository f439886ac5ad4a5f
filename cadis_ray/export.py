"""``python -m cadis_ray.export``: a model of a run as a folder that needs neither the run nor its checkpoints."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cadis_ray.errors import UsageError
from cadis_ray.interface.command import command


class Target(StrEnum):
    """What the folder is for."""

    SAFETENSORS = "safetensors"
    HF = "hf"
    MLFLOW = "mlflow"


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    to: Annotated[Target, typer.Option(help="safetensors: weights and smoothed.json; hf: the hub's layout; mlflow.")],
    out: Annotated[Path, typer.Option(help="A folder that does not exist yet.")],
    model: Annotated[str | None, typer.Option(help="A trial or baseline. Default: the winner.")] = None,
) -> None:
    """Write a smoothed classifier with its model card: weights as safetensors, everything else as JSON, no pickle.

    Examples:

      python -m cadis_ray.export runs/digits-1a2b3c4d --to safetensors --out winner

      python -m cadis_ray.export runs/digits-1a2b3c4d --to hf --model cross_entropy --out rival

    hf: the root is the base classifier, fine-tuned, for timm or transformers; smoothed/ is what was certified.
    """
    if out.exists():
        raise UsageError(f"{out} exists; give another --out")
    from cadis_ray.results.read import read_result
    from cadis_ray.storage.run_folder import RunFolder
    from cadis_ray.study.study import read_study

    study = read_study(run)
    with RunFolder(run).open_ledger() as ledger:
        result, rows = read_result(study, run, ledger), {row.name: row for row in ledger.trials()}
    name = model or result.winner
    if name is None:
        raise UsageError(f"{run}: has no winner yet; finish it, or give --model, one of {', '.join(rows)}")
    if name not in rows:
        raise UsageError(f"--model: got {name!r}; need one of {', '.join(rows)}")
    if to is Target.MLFLOW:
        from cadis_ray.results.mlflow.models import write_pyfunc as write
    elif to is Target.HF:
        from cadis_ray.results.export.write import write_hub as write
    else:
        from cadis_ray.results.export.write import write_safetensors as write
    write(out, study, result, rows[name])
    print(f"{name} is in {out}/")


if __name__ == "__main__":
    command(export)
