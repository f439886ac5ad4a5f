"""Where everything stands in the folder of a run."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cadis_ray.errors import IntegrityError, UsageError
from cadis_ray.storage.ledger import Ledger

STUDY, RESOLVED = "study.yaml", "study.json"
LEDGER, RESULT = "ledger.sqlite", "result.json"
FOLDER, REQUEST = "certificates", "request.json"


def certificates_file(run_dir: Path, name: str) -> Path:
    """``run_dir/certificates/NAME.tsv``; characters of a name that a path would act on are percent-encoded."""
    return run_dir / "certificates" / f"{quote(name, safe='')}.tsv"


def evidence_file(folder: Path, name: str) -> Path:
    """Where the records of a model stand."""
    return certificates_file(folder, name).with_suffix(".jsonl")


def read_ending(run_dir: Path) -> dict[str, Any]:
    """The content of result.json; empty where the run has not ended yet. Raises IntegrityError where it is damaged."""
    try:
        return json.loads((run_dir / RESULT).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{run_dir / RESULT}: cannot be read ({error})") from error


def open_ledger(run_dir: Path) -> Ledger:
    """The ledger of a run. Raises UsageError where there is none."""
    if not (run_dir / LEDGER).is_file():
        raise UsageError(f"{run_dir}: no {LEDGER}; need the folder of a run that was started")
    return Ledger(run_dir / LEDGER)
