"""Ray-distributed hyperparameter search for certifiably robust classifiers. docs/api.md says what may be imported."""

from typing import TYPE_CHECKING

from cadis_ray.interface.lazy import lazy

if TYPE_CHECKING:
    from cadis_ray.engine.call import run_study
    from cadis_ray.results.export.smoothed import SmoothedClassifier
    from cadis_ray.results.report.notebook import load
    from cadis_ray.smoothing.certifier import certify_images

__version__ = "0.1.0"
__all__ = ["SmoothedClassifier", "certify_images", "load", "run_study"]
__getattr__ = lazy(
    __name__,
    {
        "cadis_ray.engine.call": ["run_study"],
        "cadis_ray.results.export.smoothed": ["SmoothedClassifier"],
        "cadis_ray.results.report.notebook": ["load"],
        "cadis_ray.smoothing.certifier": ["certify_images"],
    },
)
