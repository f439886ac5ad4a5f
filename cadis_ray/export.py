"""``python -m cadis_ray.export``: a model of a run as a folder that needs neither the run nor its checkpoints."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cadis_ray.errors import UsageError
from cadis_ray.interface.command import command

if TYPE_CHECKING:
    from cadis_ray.config import Study
    from cadis_ray.results import StudyResult
    from cadis_ray.storage.ledger import TrialRow

CARD = "README.md"


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
    from cadis_ray.finished import read_result
    from cadis_ray.run import read_study
    from cadis_ray.storage.run_folder import open_ledger

    study = read_study(run)
    with open_ledger(run) as ledger:
        result, rows = read_result(study, run, ledger), {row.name: row for row in ledger.trials()}
    name = model or result.winner
    if name is None:
        raise UsageError(f"{run}: has no winner yet; finish it, or give --model, one of {', '.join(rows)}")
    if name not in rows:
        raise UsageError(f"--model: got {name!r}; need one of {', '.join(rows)}")
    write_model(out, to, study, result, rows[name])
    print(f"{name} is in {out}/")


def write_model(
    out: Path,
    to: Target,
    study: "Study",
    result: "StudyResult",
    row: "TrialRow",
    described: Any = None,
) -> None:
    """Write a model to ``out``, which must not exist; ``described``: of one logged to MLflow, its ``Model``.

    Raises UsageError for a trial that has no weights.
    """
    import shutil
    import tempfile

    from cadis_ray.card import model_card
    from cadis_ray.config import configuration
    from cadis_ray.finetuning.base_classifier import load_finetuned
    from cadis_ray.models.classifiers.classifier import Classifier
    from cadis_ray.models.hub_export import write_hub_folder
    from cadis_ray.smoothed import save_smoothed

    chosen = configuration(study, row.parameters)
    if row.checkpoint is None and chosen.finetuning.recipe != "none":
        raise UsageError(f"{row.name} is {row.state} and has no checkpoint; give another --model")
    checkpoint = Path(row.checkpoint) if row.checkpoint else None
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    # Beside it, not in it: the folder appears whole or not at all.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.resolve().parent) as temporary:
        made = Path(temporary) / "made"
        smoothed = made / "smoothed" if to is Target.HF else Path(temporary) / "smoothed"
        record = save_smoothed(smoothed, study.base, chosen, checkpoint)
        card = smoothed / CARD
        card.write_text(model_card(result, row.name, record))
        if to is Target.MLFLOW:
            from cadis_ray import pyfunc

            pyfunc.save(made, smoothed, card.rename(Path(temporary) / CARD), described)
        elif to is Target.HF:
            classifier = load_finetuned(chosen, checkpoint)
            assert isinstance(classifier, Classifier), "save_smoothed refused a black box"
            write_hub_folder(made, classifier, chosen.classifier.library)
            card.rename(made / CARD)
        else:
            smoothed.rename(made)
        shutil.move(made, out)


if __name__ == "__main__":
    command(export)
