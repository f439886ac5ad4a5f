"""``python -m cadis_ray.data check ROOT``: what a data set's folder holds, and what of it is broken."""

import sys
from typing import Annotated

import typer

from cadis_ray.errors import DataError
from cadis_ray.interface.command import command


def check(
    root: Annotated[str, typer.Argument(help="The data set's folder, or its URI (s3://BUCKET/FOLDER).")],
) -> None:
    """Decode every image of a data set: counts by class, image sizes, broken files.

    Knows CIFAR-10's Python and binary batches, train/CLASS/* with val/CLASS/*, and Parquet shards of encoded images.

    Example: python -m cadis_ray.data check /data/imagenet
    """
    from cadis_ray.data.check import look_at
    from cadis_ray.interface.progress import Progress

    with Progress() as progress:
        found = look_at(root, progress)
    print("\n".join(found.lines()))
    if found.broken:
        raise DataError("\n".join([f"{root}: {len(found.broken)} broken images", *found.broken]))
    print("every image can be read")


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        del sys.argv[1]
    command(check)
