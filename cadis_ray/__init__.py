"""Ray-distributed hyperparameter search for certifiably robust classifiers. docs/api.md says what may be imported."""

from typing import TYPE_CHECKING

from cadis_ray.interface.lazy import lazy

if TYPE_CHECKING:
    from cadis_ray.results.report.notebook import load

__version__ = "0.1.0"
__all__ = ["load"]
__getattr__ = lazy(__name__, {"cadis_ray.results.report.notebook": ["load"]})
