"""Classifiers off the shelf, of timm, transformers and the CIFAR ResNets."""

from typing import TYPE_CHECKING

from cadis_ray.interface.lazy import lazy

if TYPE_CHECKING:
    from cadis_ray.models.classifiers.classifier import load_classifier

__all__ = ["load_classifier"]
__getattr__ = lazy(__name__, {"cadis_ray.models.classifiers.classifier": ["load_classifier"]})
