"""Where everything stands in the folder of a run: the one place that spells its files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cadis_ray.errors import IntegrityError, UsageError
from cadis_ray.storage.ledger import Ledger

TRAINING = "training"
# Kept of a trial: the ledger may know the last epoch's or the one's before, and between them one may be interrupted.
CHECKPOINTS = 3


@dataclass(frozen=True)
class RunFolder:
    """The files and folders of a run, or of ``certify``; none of them need exist.

    What is written into a run names what is in it by a path within it, so that a run can be moved and copied.
    """

    path: Path

    @property
    def study(self) -> Path:
        """The study file as it was given."""
        return self.path / "study.yaml"

    @property
    def resolved(self) -> Path:
        """The study with its defaults and absolute paths."""
        return self.path / "study.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def counts(self) -> Path:
        """The folder of all votes of finalists and certificates."""
        return self.path / "counts"

    @property
    def pool(self) -> Path:
        """The folder of the denoised images; gone when nothing trains any more."""
        return self.path / "pool"

    @property
    def training(self) -> Path:
        """The folder of the trials' checkpoints."""
        return self.path / TRAINING

    @property
    def tune(self) -> Path:
        """The folder of Ray Tune's own files."""
        return self.path / "tune"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def request(self) -> Path:
        """What was certified."""
        return self.path / "certificates" / "request.json"

    @property
    def winner(self) -> Path:
        """The winner's certificates."""
        return self.path / "certificates.tsv"

    @property
    def examples(self) -> Path:
        return self.path / "examples.npz"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def report_markdown(self) -> Path:
        return self.path / "report.md"

    @property
    def mlflow(self) -> Path:
        """MLflow's database, where the study names no server."""
        return self.path / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.path / "mlartifacts"

    def certificates(self, name: str) -> Path:
        """A model's certificates; characters of its name that a path would act on are percent-encoded."""
        return self.path / "certificates" / f"{quote(name, safe='')}.tsv"

    def evidence(self, name: str) -> Path:
        """A model's records, one line an image."""
        return self.certificates(name).with_suffix(".jsonl")

    def within(self, path: str | Path) -> str:
        """A path as the run keeps it: within the run where it lies there, else absolute."""
        path = Path(path).absolute()
        home = self.path.absolute()
        return path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)

    def checkpoint(self, kept: str) -> Path:
        """The folder of a checkpoint that the run names.

        Runs made before paths were kept within the run have an absolute one; where that is gone, because the run was
        moved, it is looked for in this one.
        """
        path = self.path / kept
        parts = Path(kept).parts
        if not path.exists() and TRAINING in parts:
            moved = self.path.joinpath(*parts[len(parts) - 1 - parts[::-1].index(TRAINING) :])
            return moved if moved.exists() else path
        return path

    def ending(self) -> dict[str, Any]:
        """Read result.json; empty where the run has not ended yet. Raises IntegrityError where it is damaged."""
        try:
            return json.loads(self.result.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{self.result}: cannot be read ({error})") from error

    def open_ledger(self) -> Ledger:
        """Open the ledger. Raises UsageError where there is none, which opening would make."""
        if not self.ledger.is_file():
            raise UsageError(f"{self.path}: no {self.ledger.name}; need the folder of a run that was started")
        return Ledger(self.ledger)
