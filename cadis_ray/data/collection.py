"""The data sets that a study can name, as they lie on disk. Importing this is cheap, and nothing here needs torch."""

from typing import TYPE_CHECKING

from cadis_ray.data.cifar10 import read_cifar10
from cadis_ray.data.image_folder import read_image_folder
from cadis_ray.data.parquet import read_parquet
from cadis_ray.data.settings import Data
from cadis_ray.data.sources import DATA_SETS, image_shape
from cadis_ray.data.storage import open_root
from cadis_ray.errors import DataError

if TYPE_CHECKING:
    from cadis_ray.data.images import Collection


def read_collection(settings: Data) -> "Collection":
    """The images at ``settings.path``, those of image_folder and parquet only listed.

    Raises DataError, naming the path and what is wrong in it.
    """
    if settings.path is None:
        raise DataError(f"data.path: missing; need the folder or URI of {settings.name}")
    root = open_root(settings.path)
    try:
        if settings.name == "cifar10":
            return read_cifar10(settings.path)
        read = read_image_folder if settings.name == "image_folder" else read_parquet
        return read(root, settings.image_size)
    except DataError as error:
        raise DataError("\n".join(f"{settings.path}: {line}" for line in str(error).splitlines())) from None


def training_size(settings: Data) -> tuple[int, tuple[int, int, int]]:
    """How many training images a study uses, and their (C, H, W); asks the disk only where the settings do not say."""
    shape, used = image_shape(settings.name, settings.image_size), settings.train
    if used is None and settings.name in DATA_SETS:
        used = DATA_SETS[settings.name].images - settings.validation
        used -= settings.test if settings.name == "digits" else 0
    if used is None or shape is None:
        found = read_collection(settings).train
        return used or len(found.labels) - settings.validation, found.images.shape
    return used, shape
