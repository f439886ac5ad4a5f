"""The section of the study file that says where images come from."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from cadis_ray.interface.section import Count, Section, without_password


class Data(Section):
    """Where images come from and how many of each split are used.

    ``path``: the data set's folder or its URI (s3://, gs://); digits has none. ``validation`` images are a seeded
    slice of the training images; ``train`` of the rest are trained on, None: all. ``test`` images are the data set's
    own, chosen by ``test_subset``: ``first`` of a seeded order, ``per_class`` the same number of each, ``every`` k-th.
    ``image_size``: to resize and crop the test images of image_folder and parquet to; None: as they are.
    """

    name: Literal["digits", "cifar10", "image_folder", "parquet"]
    path: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    train: Count | None = None
    validation: Count = 400
    test: Count = 400
    test_subset: Literal["first", "per_class", "every"] = "first"
    augmentation: Literal["none", "cifar10", "imagenet"] = "none"
    image_size: Count | None = None

    @field_validator("path")
    @classmethod
    def _without_password(cls, path: str | None) -> str | None:
        return without_password(path, "to the storage by its environment variables")
