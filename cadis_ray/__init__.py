"""Ray-distributed hyperparameter search for certifiably robust classifiers."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cadis_ray.notebook import Run

__version__ = "0.1.0"


def load(run_dir: str | Path) -> "Run":
    """A run's trials, epochs and certificates as pandas frames, its figures, and a page for the notebook."""
    from cadis_ray import notebook  # seconds, which importing this package must not cost

    return notebook.load(Path(run_dir))
