"""Images in [0, 1] with integer labels, in named, seeded splits."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cadis_ray.data.splits import DataSet, Split, load

__all__ = ["DataSet", "Split", "load"]


def __getattr__(name: str) -> Any:
    """Names that need torch, imported when asked for: ``python -m cadis_ray.data --help`` answers without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cadis_ray.data import splits

    return getattr(splits, name)
