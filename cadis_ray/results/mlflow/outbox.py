"""What a run has to tell MLflow, sent while it works."""

import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cadis_ray.interface.text import one_line
from cadis_ray.results.mlflow.store import Status, address, without_secrets
from cadis_ray.results.mlflow.sync import sync
from cadis_ray.results.study import StudyResult
from cadis_ray.storage.ledger import Ledger
from cadis_ray.study.study import Study

SYNC_SECONDS = 5.0


class Outbox:
    """Keeps MLflow up to date from a daemon thread while the study runs, and never delays or fails it.

    The thread has a ledger connection of its own. The first failure becomes one ``warn`` line, said from that
    thread; the ledger keeps what was not taken, and the next ``sync`` of the run sends it.
    """

    def __init__(self, ledger_path: Path, study: Study, run_dir: Path, warn: Callable[[str], None]) -> None:
        self._study, self._run_dir, self._ledger_path = study, run_dir, ledger_path
        self._warn, self._warned = warn, False
        self._closing = threading.Event()
        self._final: tuple[StudyResult | None, Status] = (None, "RUNNING")
        self._drained = False
        self._thread = threading.Thread(target=self._work, name="mlflow-outbox", daemon=True)
        self._thread.start()

    def close(self, result: StudyResult | None, status: Status, limit: float) -> bool:
        """Send the rest within ``limit`` seconds; whether all of it was taken."""
        self._final = (result, status)
        self._closing.set()
        self._thread.join(limit)
        if not self._drained:
            self._complain(f"not done after {limit:g} s")
        return self._drained

    def _work(self) -> None:
        with self._forgiven(), Ledger(self._ledger_path) as ledger:
            while not self._closing.wait(SYNC_SECONDS):
                with self._forgiven():
                    sync(ledger, self._study, self._run_dir)
            sync(ledger, self._study, self._run_dir, *self._final)
            self._drained = True

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracking server does, the study goes on
            self._complain(f"{type(error).__name__}: {error}")

    def _complain(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            uri = address(self._study, self._run_dir)
            message = f"MLflow at {uri} does not take everything ({one_line(problem)[:300]})."
            self._warn(
                without_secrets(message, uri) + " The study goes on and its ledger keeps what is missing; to send it:"
                f" python -m cadis_ray.compare sync {shlex.quote(str(self._run_dir))}"
            )
