"""Files that outlive a run: written whole or not at all; certificates as the field's tools have them."""

import io
import json
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from cadis_ray.errors import IntegrityError
from cadis_ray.results import Certificates, Examples
from cadis_ray.storage.files import write_whole
from cadis_ray.storage.run_folder import certificates_file

EXAMPLES = "examples.npz"


def write_result(run_dir: Path, payload: dict[str, Any]) -> None:
    """Write ``run_dir/result.json``. Raises ``ValueError`` for NaN or infinity, which are not JSON."""
    write_whole(run_dir / "result.json", json.dumps(payload, indent=2, allow_nan=False) + "\n")


def certificates_tsv(certificates: Certificates) -> str:
    """The columns ``idx label predict radius correct time`` of Cohen et al.'s certify.py, one line an image.

    ``radius`` is the shortest decimal that reads back as the same float64: three digits, as the official
    programs print, round across the radii that tables report. ``time`` is h:mm:ss.ffffff.
    """
    c = certificates
    columns = (c.idx, c.label, c.predict, c.radius, c.correct, c.seconds)
    lines = ["idx\tlabel\tpredict\tradius\tcorrect\ttime"]
    for idx, label, predict, radius, correct, seconds in zip(*columns, strict=True):
        cells = (int(idx), int(label), int(predict), repr(float(radius)), int(correct), clock(float(seconds)))
        lines.append("\t".join(map(str, cells)))
    return "\n".join(lines) + "\n"


def write_certificates(run_dir: Path, certificates: dict[str, Certificates], winner: str | None) -> None:
    """Write every model's certificates, and the winner's also as ``certificates.tsv``."""
    for name, rows in certificates.items():
        write_whole(certificates_file(run_dir, name), certificates_tsv(rows))
        if name == winner:
            write_whole(run_dir / "certificates.tsv", certificates_tsv(rows))


def write_examples(run_dir: Path, examples: Examples) -> None:
    """Write them into the folder of a run, whole or not at all."""
    held: dict[str, Any] = vars(examples)
    file = io.BytesIO()
    np.savez_compressed(file, **held)
    write_whole(run_dir / EXAMPLES, file.getvalue())


def read_examples(run_dir: Path) -> Examples | None:
    """What ``write_examples`` wrote; None where nothing was. Raises IntegrityError for a damaged file."""
    try:
        with (run_dir / EXAMPLES).open("rb") as file, np.load(file, allow_pickle=False) as held:
            return Examples(**{key: held[key] for key in held.files if key != "name"}, name=str(held["name"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise IntegrityError(f"{run_dir / EXAMPLES}: damaged ({error}); remove it and resume the run") from error


def clock(seconds: float) -> str:
    """Seconds >= 0 as h:mm:ss.ffffff."""
    whole, micro = divmod(round(seconds * 1e6), 10**6)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}.{micro:06}"
