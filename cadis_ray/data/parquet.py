"""Encoded images in Parquet shards, in the Hugging Face layout.

Files: ``train-*.parquet``, and ``test-*.parquet`` or else ``validation-*.parquet``.
Columns: ``image`` or ``img``, binary or a struct with ``bytes``; ``label``, an integer.
"""

import json
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cadis_ray.data.images import Collection, Encoded, Part
from cadis_ray.data.storage import Root, files, some
from cadis_ray.errors import DataError

Place = tuple[int, int]  # (file, row group)


class Shards:
    """Encoded images by row. The last file and row group read stay in memory, and do not travel in a pickle."""

    def __init__(self, root: Root, names: list[str]) -> None:
        self.root, self.names = root, names
        self.places: list[Place] = []  # of the row groups
        self._file: tuple[int, pq.ParquetFile] | None = None
        self._group: tuple[Place, pa.Array] | None = None
        self.columns: list[str] = []
        sizes: list[int] = []
        starts = [0]
        for number in range(len(names)):
            file = self.file(number)
            self.columns.append(_image_column(names[number], file.schema_arrow))
            metadata = file.metadata
            sizes += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self.places += [(number, group) for group in range(metadata.num_row_groups)]
            starts.append(starts[-1] + metadata.num_rows)
        self.ends, self.starts = np.cumsum(sizes), np.array(starts)  # rows: of the row groups, of the files

    def name(self, row: int) -> str:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"{self.names[number]} row {row - self.starts[number]}"

    def get(self, rows: Sequence[int]) -> list[bytes]:
        """Each row group is read once, in the order of the files, whatever the order of ``rows``."""
        found: dict[int, bytes] = {}
        groups = np.searchsorted(self.ends, np.asarray(rows), side="right").tolist()
        for group, members in groupby(sorted(zip(groups, rows, strict=True)), key=lambda pair: pair[0]):
            images, start = self._images(group), int(self.ends[group - 1]) if group else 0
            for _, row in members:
                blob = images[row - start].as_py()
                if blob is None:
                    raise DataError(f"{self.name(row)} (image {row}): no image; the file holds a path at most")
                found[row] = blob
        return [found[row] for row in rows]

    def file(self, number: int) -> pq.ParquetFile:
        if self._file is None or self._file[0] != number:
            name = self.names[number]
            try:
                self._file = number, pq.ParquetFile(self.root.open_input_file(name))
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{name}: not a whole Parquet file: {error}") from None
        return self._file[1]

    def _images(self, group: int) -> pa.Array:
        place = self.places[group]
        if self._group is None or self._group[0] != place:
            self._group = None  # the old group goes before the new one comes
            number, within = place
            try:
                table = self.file(number).read_row_group(within, columns=[self.columns[number]])
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{self.names[number]}: row group {within} cannot be read: {error}") from None
            column = table.column(0).combine_chunks()
            self._group = place, column.field("bytes") if pa.types.is_struct(column.type) else column
        return self._group[1]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_file": None, "_group": None}


def read_parquet(root: Root, size: int | None) -> Collection:
    """Training and test images in the order of the shards; classes from the Hugging Face metadata, else counted.

    Labels are read, nothing is decoded. Raises DataError with the name of a shard that is missing or broken, or
    with the first rows whose label is outside the classes.
    """
    trains, tests, validations = (shards(root, part) for part in ("train", "test", "validation"))
    if not trains or not (tests or validations):
        found = some(files(root)) or "no file"
        raise DataError(f"need train-*.parquet and test-*.parquet or validation-*.parquet; found {found}")
    train, test = Shards(root, trains), Shards(root, tests or validations)
    train_labels, test_labels = (_labels(part) for part in (train, test))
    classes = _class_names(train.file(0).schema_arrow) or tuple(map(str, range(int(train_labels.max()) + 1)))
    for part, labels in ((train, train_labels), (test, test_labels)):
        if len(wrong := np.flatnonzero((labels < 0) | (labels >= len(classes)))):
            hint = "; images without labels cannot be certified" if labels[wrong[0]] == -1 else ""
            raise DataError(f"{part.name(wrong[0])}: label {labels[wrong[0]]}, but there are {len(classes)} classes "
                            f"(0...{len(classes) - 1}); {len(wrong)} such images{hint}")  # fmt: skip
    if empty := sorted(set(range(len(classes))) - set(train_labels.tolist())):
        raise DataError(f"{trains[0]}: {len(empty)} of {len(classes)} classes have no training image: "
                        f"{some([classes[label] for label in empty])}")  # fmt: skip
    return Collection(classes, Part(Encoded(train, size), train_labels), Part(Encoded(test, size), test_labels))


def shards(root: Root, part: str) -> list[str]:
    """The files of a part, ``PART.parquet`` or ``PART-*.parquet``; DataError where one ``of`` a number is missing."""
    found = [name for name in files(root) if re.fullmatch(rf"{part}(-.*)?\.parquet", name)]
    matches = [match for name in found if (match := re.search(r"-(\d+)-of-(\d+)", name))]
    for total in {int(match[2]) for match in matches}:
        there = {int(match[1]) for match in matches if int(match[2]) == total}
        if missing := sorted(set(range(total)) - there):
            raise DataError(f"{part}-*.parquet: {len(missing)} of {total} shards are missing: number "
                            f"{some([str(number) for number in missing])}")  # fmt: skip
    return found


def _image_column(name: str, schema: pa.Schema) -> str:
    for column in ("image", "img"):
        if column in schema.names:
            kind = schema.field(column).type
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                return f"{column}.bytes"
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return column
            raise DataError(f"{name}: column {column} is {kind}; need encoded images, binary or a struct with bytes")
    raise DataError(f"{name}: columns {some(schema.names)}; need image or img")


def _labels(part: Shards) -> np.ndarray:
    labels = []
    for number, name in enumerate(part.names):
        file = part.file(number)
        if "label" not in file.schema_arrow.names:
            raise DataError(f"{name}: columns {some(file.schema_arrow.names)}; need label")
        column = file.read(columns=["label"]).column(0)
        if column.null_count or not pa.types.is_integer(column.type):
            raise DataError(f"{name}: column label is {column.type} with {column.null_count} nulls; need integers")
        labels.append(column.to_numpy().astype(np.int64))
    if not sum(map(len, labels)):
        raise DataError(f"{some(part.names)}: no images")
    return np.concatenate(labels)


def _class_names(schema: pa.Schema) -> tuple[str, ...] | None:
    """Names that Hugging Face's ``datasets`` leaves in the schema."""
    try:
        return tuple(json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None
