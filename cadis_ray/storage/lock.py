"""One driver a run."""

import fcntl
import os
import socket
import time
from pathlib import Path

from cadis_ray.errors import EnvironmentProblem, IntegrityError


class RunLock:
    """Exclusive hold of a run by one driver, as a context manager; the kernel lets go when the process dies.

    The file says who holds it: host, process id, since when. A second driver gets that as ``IntegrityError``.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __enter__(self) -> "RunLock":
        try:
            self._file = self.path.open("a+")
        except OSError as error:
            raise EnvironmentProblem(f"{self.path}: cannot open the run's lock: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            if not isinstance(error, BlockingIOError):
                raise EnvironmentProblem(f"{self.path}: cannot lock the run: {error.strerror}") from error
            raise IntegrityError(
                f"{self.path.parent} is in use by another driver: {holder or 'not yet named'}."
                " Wait for it, stop it, or take another run directory"
            ) from error
        self._file.truncate(0)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._file.write(f"host {socket.gethostname()}, process {os.getpid()}, since {since}\n")
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
