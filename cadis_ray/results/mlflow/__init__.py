"""Trials, certificates and models in MLflow: the only folder that imports it."""
