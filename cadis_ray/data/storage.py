"""The folder of a data set, on a local disk or on any file system that pyarrow knows by URI (s3://, gs://)."""

import os.path
from typing import Any, TypeAlias

import pyarrow as pa
from pyarrow import fs

from cadis_ray.errors import DataError

Root: TypeAlias = Any  # a pyarrow.fs.FileSystem, which has no types, rooted at the data set's folder; can be pickled


def open_root(path: str) -> Root:
    """The folder at a local path or URI. Raises DataError where there is none or it cannot be reached."""
    try:
        if "://" in path:
            filesystem, folder = fs.FileSystem.from_uri(path)
        else:
            filesystem, folder = fs.LocalFileSystem(), os.path.abspath(path)
        kind = filesystem.get_file_info(folder).type
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if kind != fs.FileType.Directory:
        raise DataError(f"{path}: {'a file' if kind == fs.FileType.File else 'not there'}; need a folder")
    return fs.SubTreeFileSystem(folder, filesystem)


def files(root: Root, folder: str = "") -> list[str]:
    """Names of the files in a folder, sorted, without hidden ones."""
    return _names(root, folder, fs.FileType.File)


def folders(root: Root, folder: str = "") -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    return _names(root, folder, fs.FileType.Directory)


def read(root: Root, name: str) -> bytes:
    """The content of a file. Raises DataError with its name."""
    try:
        with root.open_input_file(name) as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error}") from None


def some(names: list[str], most: int = 5) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _names(root: Root, folder: str, kind: Any) -> list[str]:
    try:
        found = root.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    except OSError as error:
        raise DataError(f"{folder or 'the folder'}: cannot be listed: {error}") from None
    return sorted(info.base_name for info in found if info.type == kind and not info.base_name.startswith("."))
