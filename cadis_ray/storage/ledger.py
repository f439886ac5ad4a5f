"""What a study has to say: plain data, from which table, report, MLflow and result.json are made."""

import json
import math
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cadis_ray.errors import EnvironmentProblem, IntegrityError
from cadis_ray.storage.files import network_file_system
from cadis_ray.storage.packing import compress, decompress

State = Literal["running", "complete", "pruned", "failed"]
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE trials (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, baseline TEXT, parameters TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'complete', 'pruned', 'failed')), reason TEXT,
    started REAL NOT NULL, ended REAL, checkpoint TEXT, trainable_parameters INTEGER
);
CREATE TABLE epochs (
    trial INTEGER NOT NULL REFERENCES trials (number), epoch INTEGER NOT NULL, metrics TEXT NOT NULL,
    images INTEGER NOT NULL, columns INTEGER NOT NULL, counts BLOB NOT NULL,
    checkpoint TEXT, recorded REAL NOT NULL,
    PRIMARY KEY (trial, epoch)
);
CREATE TABLE logged (key TEXT PRIMARY KEY) WITHOUT ROWID;
"""
DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB")


@dataclass(frozen=True)
class TrialRow:
    """One trial or baseline (``baseline``: its name in the study file). Times are seconds since 1970, UTC."""

    number: int
    name: str
    baseline: str | None
    parameters: dict[str, Any]
    state: State
    reason: str | None
    started: float
    ended: float | None
    checkpoint: str | None
    trainable_parameters: int | None


@dataclass(frozen=True, eq=False)
class EpochRow:
    """What a trial counted after an epoch: ``counts`` int32 (N, K + 1). ``recorded``: seconds since 1970."""

    trial: int
    epoch: int
    metrics: dict[str, float]
    counts: np.ndarray
    checkpoint: str | None
    recorded: float


class Ledger:
    """An open ledger; create it if the file is absent. Use it from the thread that opened it.

    Every write is on disk when the call returns (``synchronous=FULL``): a killed process or a power cut loses at
    most the call in progress. Raises ``IntegrityError`` for a damaged file or another schema version
    and ``EnvironmentProblem`` where the disk is full or not writable.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with self._errors():
            self._connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            with self._errors():
                journal = "DELETE" if network_file_system(self.path) else "WAL"
                for pragma in (f"journal_mode = {journal}", "synchronous = FULL", "foreign_keys = ON"):
                    self._connection.execute(f"PRAGMA {pragma}")
            self._check_schema()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def meta(self, key: str) -> str | None:
        """The value stored for ``key``, or None."""
        found = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return found[0][0] if found else None

    def metas(self, prefix: str) -> dict[str, str]:
        """Every stored value whose key begins with ``prefix``."""
        found = self._rows("SELECT key, value FROM meta WHERE substr(key, 1, ?) = ?", len(prefix), prefix)
        return dict(found)

    def set_meta(self, key: str, value: str) -> None:
        """Store ``value`` for ``key``; another value than the stored one is an ``IntegrityError``."""
        with self._transaction():
            stored = self.meta(key)
            self._verify(stored in (None, value), f"{key} is {stored!r}, this run has {value!r}")
            if stored is None:
                self._connection.execute("INSERT INTO meta VALUES (?, ?)", (key, value))

    def open_trial(self, number: int, name: str, baseline: str | None, parameters: Mapping[str, Any]) -> TrialRow:
        """Insert a running trial, or verify that the stored one is the same trial, and return its row.

        The row tells a resuming driver what is left to do: a running one goes on after ``last_epoch``,
        a closed one is finished.
        """
        text = _json(parameters, f"the parameters of trial {number}")
        with self._transaction():
            stored = self._rows("SELECT name, baseline, parameters FROM trials WHERE number = ?", number)
            if stored:
                given = (name, baseline, text)
                self._verify(stored[0] == given, f"trial {number} is {stored[0]}, now it was given as {given}")
            else:
                taken = self._rows("SELECT number FROM trials WHERE name = ?", name)
                self._verify(not taken, f"trial {number} was named {name!r}, which is the name of another trial")
                self._connection.execute(
                    "INSERT INTO trials (number, name, baseline, parameters, state, started)"
                    " VALUES (?, ?, ?, ?, 'running', ?)",
                    (number, name, baseline, text, time.time()),
                )
        return self._trial(number)

    def record_epoch(
        self,
        number: int,
        epoch: int,
        metrics: Mapping[str, float],
        counts: np.ndarray,
        checkpoint: str | None = None,
    ) -> None:
        """Store what a running trial counted after ``epoch``, or verify that the stored counts are equal.

        ``counts``: integers (N, K + 1), not negative. Of a repeated epoch the first metrics and checkpoint
        are kept: seconds differ from one execution to the next, counts must not. Raises ``ValueError`` for
        a metric that is not a finite number, ``IntegrityError`` for other counts or a closed trial.
        """
        wrong = [
            f"{key} = {value!r}" for key, value in metrics.items()
            if not isinstance(value, int | float | np.number) or not math.isfinite(value)
        ]  # fmt: skip
        if wrong:
            raise ValueError(f"trial {number}, epoch {epoch}: metrics must be finite numbers, got {', '.join(wrong)}")
        votes = np.asarray(counts)
        if votes.ndim != 2 or votes.dtype.kind not in "iu":
            raise ValueError(f"counts must be integers (N, K + 1), got {votes.dtype} {votes.shape}")
        if votes.size and (votes.min() < 0 or votes.max() >= 2**31):
            raise ValueError(f"counts must lie in [0, 2**31), got {votes.min()} to {votes.max()}")
        text = _json({key: float(value) for key, value in metrics.items()}, "metrics")
        with self._transaction():
            stored = list(self._epochs(number, epoch))
            if stored:
                self._verify(
                    np.array_equal(stored[0].counts, votes),
                    f"trial {number}, epoch {epoch}: other counts than the stored; not deterministic",
                )
                return
            state = self._trial(number).state
            self._verify(state == "running", f"epoch {epoch} was added to trial {number}, which is {state}")
            blob = compress(votes)
            self._connection.execute(
                "INSERT INTO epochs VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (number, epoch, text, *votes.shape, blob, checkpoint, time.time()),
            )

    def close_trial(
        self,
        number: int,
        state: Literal["complete", "pruned", "failed"],
        reason: str | None = None,
        checkpoint: str | None = None,
        trainable_parameters: int | None = None,
    ) -> None:
        """Give a trial its terminal state. The same state again changes nothing, another is refused."""
        if state not in ("complete", "pruned", "failed"):
            raise ValueError(f"a trial ends as complete, pruned or failed, not as {state!r}")
        with self._transaction():
            stored = self._trial(number).state
            self._verify(stored in ("running", state), f"trial {number} is {stored}, now it was closed as {state}")
            if stored == "running":
                self._connection.execute(
                    "UPDATE trials SET state = ?, reason = ?, ended = ?, checkpoint = ?,"
                    " trainable_parameters = ? WHERE number = ?",
                    (state, reason, time.time(), checkpoint, trainable_parameters, number),
                )

    def trials(self) -> list[TrialRow]:
        """All trials by number."""
        return [_trial_row(row) for row in self._rows("SELECT * FROM trials ORDER BY number")]

    def epochs(self, number: int) -> list[EpochRow]:
        """The epochs of a trial in order; empty where none is recorded."""
        return list(self._epochs(number))

    def last_epoch(self, number: int) -> int | None:
        """The last recorded epoch of a trial, or None."""
        return self._rows("SELECT max(epoch) FROM epochs WHERE trial = ?", number)[0][0]

    def mark_logged(self, *keys: str) -> None:
        """Remember that the tracking server has taken these; marking again changes nothing."""
        with self._transaction():
            self._connection.executemany("INSERT OR IGNORE INTO logged VALUES (?)", [(key,) for key in keys])

    def logged(self) -> set[str]:
        """Every key given to ``mark_logged``."""
        return {key for (key,) in self._rows("SELECT key FROM logged")}

    def _check_schema(self) -> None:
        with self._transaction():
            version = self._rows("PRAGMA user_version")[0][0]
            if version == 0 and not self._rows("SELECT 1 FROM sqlite_master"):
                for statement in (SCHEMA + f"PRAGMA user_version = {SCHEMA_VERSION};").split(";"):
                    self._connection.execute(statement)
                return
        self._verify(
            version == SCHEMA_VERSION,
            f"its schema version is {version}, this program reads {SCHEMA_VERSION}",
        )
        damage = self._rows("PRAGMA quick_check")[0][0]
        self._verify(damage == "ok", f"the file is damaged: {damage}")

    def _trial(self, number: int) -> TrialRow:
        found = self._rows("SELECT * FROM trials WHERE number = ?", number)
        self._verify(bool(found), f"trial {number} was never opened")
        return _trial_row(found[0])

    def _epochs(self, number: int, epoch: int | None = None) -> Iterator[EpochRow]:
        query = "SELECT * FROM epochs WHERE trial = ? AND (? IS NULL OR epoch = ?) ORDER BY epoch"
        for trial, at, metrics, images, columns, blob, checkpoint, recorded in self._rows(query, number, epoch, epoch):
            try:
                counts = decompress(blob, images, columns)
            except (zlib.error, ValueError) as error:
                raise IntegrityError(f"{self.path}: the counts of trial {trial}, epoch {at}, are damaged") from error
            yield EpochRow(trial, at, json.loads(metrics), counts, checkpoint, recorded)

    def _rows(self, query: str, *arguments: Any) -> list[Any]:
        with self._errors():
            return self._connection.execute(query, arguments).fetchall()

    def _verify(self, holds: bool, problem: str) -> None:
        if not holds:
            raise IntegrityError(f"{self.path}: {problem}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorname", "").startswith(DAMAGE):
                raise IntegrityError(f"{self.path} is damaged ({error}); restore it from a copy") from error
            raise EnvironmentProblem(
                f"{self.path}: {error}; the ledger needs a writable local disk with free space."
                " Nothing committed is lost: make room and resume the run"
            ) from error


def _json(value: Mapping[str, Any], what: str) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{what} must be finite, got {dict(value)}") from error


def _trial_row(row: tuple[Any, ...]) -> TrialRow:
    number, name, baseline, parameters, *rest = row
    return TrialRow(number, name, baseline, json.loads(parameters), *rest)
