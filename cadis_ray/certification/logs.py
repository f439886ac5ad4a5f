"""Certification logs of other programs: what Cohen et al.'s certify.py and its descendants print.

All print ``idx label predict radius``, tab-separated, and then: Cohen and CAT-RS ``correct`` (0 or 1) and ``time``;
Carlini et al. the same names, but ``correct`` counts the correct images so far; FT-CADIS that count as
``correct_num``, ``correct`` as True or False, and ``time``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cadis_ray.errors import DataError
from cadis_ray.smoothing.bounds import ABSTAIN, certified_radius

NEEDED = ("idx", "label", "predict", "radius")
ROUNDING = 0.005  # of three significant digits, which these programs print: the largest relative error
CLOCK = re.compile(r"(?:(\d+) days?, )?(\d+):(\d+):(\d+(?:\.\d+)?)")
FLAGS = {"True": "1", "False": "0"}

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Log:
    """One row an image, arrays (N,): ``predict`` is -1 where the program abstained, ``radius`` l2 and as printed.

    ``correct`` is predict == label, whatever the file counts under that name; ``seconds`` is None without times.
    """

    path: Path
    idx: Integers
    label: Integers
    predict: Integers
    radius: Floats
    correct: NDArray[np.bool_]
    seconds: Floats | None


def read_log(path: str | Path) -> Log:
    """Read a log of Cohen et al., CAT-RS, Carlini et al. or FT-CADIS, or a log's parts joined with their headers.

    Raises DataError ``FILE:LINE: ...`` for a missing column, a cell that is no number or out of range, an image that
    comes twice, and a ``correct`` that is neither predict == label nor the running count of it.
    """
    path = Path(path)
    lines: dict[int, str] = {}  # of each image, for the message about its repetition
    rows: list[tuple[int, int, int, float]] = []
    seconds: list[float] = []
    counted = 0
    for where, row in _rows(path):
        idx, label = _number(where, row, "idx", int, 0), _number(where, row, "label", int, 0)
        predict, radius = _number(where, row, "predict", int, ABSTAIN), _number(where, row, "radius", float, 0)
        if idx in lines:
            raise DataError(f"{where}: image {idx} again, first in {lines[idx]}; need each image once")
        if predict == ABSTAIN and radius > 0:
            raise DataError(f"{where}: radius {radius} with predict -1; an abstention's radius is 0")
        if "correct" in row:
            row["correct"] = FLAGS.get(row["correct"], row["correct"])
            count, flag = _number(where, row, "correct", int, 0), int(predict == label)
            if count not in (flag, counted + flag):  # a running count starts anew with each joined part
                raise DataError(f"{where}: correct is {count}; need {flag} as predict == label, or {counted + flag}"
                                " as the number of such images so far")  # fmt: skip
            counted = count
        if "time" in row:
            seconds.append(_seconds(where, row))
        lines[idx] = where
        rows.append((idx, label, predict, radius))
    if not rows:
        raise DataError(f"{path}:1: no images; need a line for each under the header")
    idx, label, predict, radius = (np.array(column) for column in zip(*rows, strict=True))
    return Log(path, idx, label, predict, radius, predict == label, np.array(seconds) if seconds else None)


def inferred_counts(log: Log, sigma: float, n: int, alpha: float) -> Integers:
    """Votes for the predicted class, k (N,) of n, that the log's radii tell: the k whose radius is the nearest.

    For simulations only. The radii are rounded, so k is uncertain by about the change that half their last digit
    makes; where ``predict`` is -1 the log says only that the top class had too few votes for any radius, and k is the
    largest such number, the hardest case. Of a wrong prediction, the label had at most n - k votes. Raises DataError
    for a radius that ``n``, ``alpha`` and ``sigma`` cannot give.
    """
    radii = certified_radius(np.arange(n + 1), n, alpha, sigma)
    if (wrong := log.radius > radii[-1] * (1 + ROUNDING)).any():
        raise DataError(
            f"{log.path}: image {log.idx[wrong][0]} has radius {log.radius[wrong][0]}, but {radii[-1]:.4g} is the"
            f" largest for sigma={sigma}, n={n}, alpha={alpha}; give those of the log"
        )
    last = int(np.searchsorted(radii, 0, side="right")) - 1  # the largest k without a radius
    above = np.clip(np.searchsorted(radii, log.radius), last + 1, n)
    below = np.maximum(above - 1, last + 1)
    nearest = np.where(log.radius - radii[below] < radii[above] - log.radius, below, above)
    return np.where(log.predict == ABSTAIN, last, nearest)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(FILE:LINE, cell by column) of every line but empty ones and headers."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}:1: cannot be read: {error}") from None
    header = lines[0].strip().split("\t") if lines else []
    if missing := [name for name in NEEDED if name not in header]:
        raise DataError(f"{path}:1: no column {', '.join(missing)}; need {' '.join(NEEDED)} in line 1, tab-separated")
    for number, line in enumerate(lines[1:], 2):
        cells = line.strip().split("\t")
        if cells in ([""], header):
            continue
        if len(cells) != len(header):
            raise DataError(f"{path}:{number}: {len(cells)} cells; need {len(header)}: {' '.join(header)}")
        yield f"{path}:{number}", dict(zip(header, cells, strict=True))


def _number(where: str, row: dict[str, str], name: str, kind: type[Number], low: int) -> Number:
    try:
        value = kind(row[name])
    except ValueError:
        value = None
    if value is None or not low <= value < 2**53:
        what = "an integer" if kind is int else "a number"
        raise DataError(f"{where}: {name} is {row[name]!r}; need {what} from {low} to 2**53")
    return value


def _seconds(where: str, row: dict[str, str]) -> float:
    """Of 15.4 or 0:02:32.7 or 1 day, 2:03:04."""
    if clock := CLOCK.fullmatch(row["time"]):
        days, hours, minutes, seconds = (float(part or 0) for part in clock.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return _number(where, row, "time", float, 0)
