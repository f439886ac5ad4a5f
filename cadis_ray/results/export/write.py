"""A model of a run as a folder that needs neither the run nor its checkpoints."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cadis_ray.errors import UsageError
from cadis_ray.finetuning.base_classifier import load_finetuned
from cadis_ray.models.classifiers.classifier import Classifier
from cadis_ray.results.export.card import model_card
from cadis_ray.results.export.hub import write_hub_folder
from cadis_ray.results.export.smoothed import save_smoothed
from cadis_ray.results.study import StudyResult
from cadis_ray.storage.ledger import TrialRow
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.study import Study, configuration

CARD = "README.md"


def write_safetensors(out: Path, study: Study, result: StudyResult, row: TrialRow) -> None:
    """Write a smoothed classifier to ``out``, which must not exist. UsageError for a trial that has no weights."""
    with whole_folder(out) as temporary:
        write_smoothed(temporary / "made", study, result, row)


def write_hub(out: Path, study: Study, result: StudyResult, row: TrialRow) -> None:
    """Write a base classifier in the hub's layout, the smoothed one in ``smoothed/``; otherwise as above."""
    chosen = configuration(study, row.parameters)
    with whole_folder(out) as temporary:
        made = temporary / "made"
        card = write_smoothed(made / "smoothed", study, result, row)
        classifier = load_finetuned(chosen, checkpoint_of(result, row))
        assert isinstance(classifier, Classifier), "save_smoothed refused a black box"
        write_hub_folder(made, classifier, chosen.classifier.library)
        card.rename(made / CARD)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder whose ``made`` becomes ``out`` when the block ends: whole or not at all."""
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.resolve().parent) as temporary:  # beside it
        yield Path(temporary)
        shutil.move(Path(temporary) / "made", out)


def write_smoothed(folder: Path, study: Study, result: StudyResult, row: TrialRow) -> Path:
    """Write a trial's smoothed classifier and its model card into a new folder; returns the card's path."""
    chosen = configuration(study, row.parameters)
    if row.checkpoint is None and chosen.finetuning.recipe != "none":
        raise UsageError(f"{row.name} is {row.state} and has no checkpoint; give another --model")
    record = save_smoothed(folder, study.base, chosen, checkpoint_of(result, row))
    card = folder / CARD
    card.write_text(model_card(result, row.name, record))
    return card


def checkpoint_of(result: StudyResult, row: TrialRow) -> Path | None:
    """The folder of a trial's last checkpoint; None where nothing was trained."""
    return RunFolder(result.run_dir).checkpoint(row.checkpoint) if row.checkpoint else None
