"""Ray-distributed hyperparameter search for certifiably robust classifiers."""

__version__ = "0.1.0"
