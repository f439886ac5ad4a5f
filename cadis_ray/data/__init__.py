"""Images in [0, 1] with integer labels, in named, seeded splits."""

from typing import TYPE_CHECKING

from cadis_ray.interface.lazy import lazy

if TYPE_CHECKING:
    from cadis_ray.data.splits import DataSet, Split, load

__all__ = ["DataSet", "Split", "load"]
__getattr__ = lazy(__name__, {"cadis_ray.data.splits": ["DataSet", "Split", "load"]})
