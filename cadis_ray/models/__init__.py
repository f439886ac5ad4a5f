"""Diffusion schedules, denoisers, classifiers and their weights. Import the submodules: this one imports nothing."""
