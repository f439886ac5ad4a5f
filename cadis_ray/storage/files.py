"""Files written so that a reader never sees half of one, and known by their content; and what they lie on."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cadis_ray.errors import EnvironmentProblem

MOUNTS = Path("/proc/self/mounts")
# Linux's names of file systems that several machines write; those of FUSE (sshfs, s3fs, gcsfuse) are nobody's disk.
NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "gluster", "9p", "afs", "ocfs", "gfs", "fuse.")


@contextmanager
def write_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that becomes ``path`` when the block ends without an error: temporary name, fsync, move, and
    fsync of the folder, so that a power cut leaves the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of the names and contents of all files in it. Raises OSError."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path).as_posix()} {digest(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def network_file_system(path: Path, mounts: Path = MOUNTS) -> str | None:
    """The type of the file system that ``path`` lies on if other machines may write to it, too; else None.

    ``mounts``: in the format of fstab; where there is none, as on macOS, the answer is None.
    """
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return None
    path, kind, longest = path.resolve(), "", -1
    for _, place, found, *_ in lines:
        place = Path(place.replace(r"\040", " "))
        # A later mount hides an earlier one in the same place.
        if path.is_relative_to(place) and len(place.parts) >= longest:
            kind, longest = found, len(place.parts)
    return kind if kind.startswith(NETWORK) else None


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``path``, and its folder where it is missing, so that a reader never sees a part of the content.

    Raises ``EnvironmentProblem`` where the disk is full or not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}: cannot be written: {error.strerror}; make room or permit it, then resume the run"
        ) from error
