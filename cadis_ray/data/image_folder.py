"""A folder of images as ImageNet users have it: ``train/CLASS/*`` and ``val/CLASS/*``."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from cadis_ray.data.decode import SUFFIXES
from cadis_ray.data.images import Collection, Encoded, Part
from cadis_ray.data.storage import Root, files, folders, read, some
from cadis_ray.errors import DataError

PARTS = ("train", "val")


class Files:
    """One encoded image a file; ``names`` are within ``root``."""

    def __init__(self, root: Root, names: list[str]) -> None:
        self.root = root
        self.names = pa.array(names, pa.string())  # 1.3 million paths as Python texts would take 130 MB

    def name(self, row: int) -> str:
        return self.names[row].as_py()

    def get(self, rows: Sequence[int]) -> list[bytes]:
        return [read(self.root, self.name(row)) for row in rows]


def read_image_folder(root: Root, size: int | None) -> Collection:
    """The images of ``train`` and ``val``, by class and then by name: torchvision's order; label k is the k-th class.

    Nothing is decoded. Raises DataError with every problem: loose files, a file that is no image by its name, a
    class without images or in one part only.
    """
    if absent := [part for part in PARTS if not folders(root, part)]:
        found = some([f"{name}/" for name in folders(root)] + files(root)) or "nothing"
        loose = "".join(f"; {_loose(root, part)}" for part in absent if files(root, part))
        raise DataError(f"need train/ and val/ with one folder per class; found {found}{loose}")
    problems: list[str] = []
    listed = {part: _listed(root, part, problems) for part in PARTS}
    classes = tuple(listed["train"])
    for part, other in (PARTS, PARTS[::-1]):
        problems += [f"{other}/{name}: a class that {part}/ has not" for name in listed[other].keys() - listed[part]]
    if problems:
        raise DataError("\n".join(sorted(problems)))
    return Collection(classes, *(_part(root, part, listed[part], size) for part in PARTS))


def _listed(root: Root, part: str, problems: list[str]) -> dict[str, list[str]]:
    if files(root, part):
        problems.append(_loose(root, part))
    listed = {name: files(root, f"{part}/{name}") for name in folders(root, part)}
    for name, images in listed.items():
        foreign = [image for image in images if not image.lower().endswith(SUFFIXES)]
        problems += [f"{part}/{name}/{image}: not an image by its name; take it away" for image in foreign]
        if not images:
            problems.append(f"{part}/{name}: a class without images")
    return listed


def _loose(root: Root, part: str) -> str:
    found = files(root, part)
    return f"{part}/: {len(found)} loose files ({some(found, 2)}); put each into the folder of its class"


def _part(root: Root, part: str, listed: dict[str, list[str]], size: int | None) -> Part:
    names = [f"{part}/{name}/{image}" for name, images in listed.items() for image in images]
    labels = np.repeat(np.arange(len(listed)), [len(images) for images in listed.values()])
    return Part(Encoded(Files(root, names), size), labels)
