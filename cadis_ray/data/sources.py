"""What is known of the built-in data sets before anything is read."""

from typing import NamedTuple


class ImageSet(NamedTuple):
    """Size of a data set: number of its images but for its own test images, and their (C, H, W)."""

    images: int
    shape: tuple[int, int, int]


DATA_SETS = {"digits": ImageSet(1_797, (1, 8, 8)), "cifar10": ImageSet(50_000, (3, 32, 32))}
TEST_IMAGES = {"cifar10": 10_000}  # of data sets that have their own; those of digits are taken from its images


def image_shape(name: str, image_size: int | None) -> tuple[int, int, int] | None:
    """(C, H, W) of a data set's images; None where only the images themselves say."""
    if name in DATA_SETS:
        return DATA_SETS[name].shape
    return (3, image_size, image_size) if image_size else None
