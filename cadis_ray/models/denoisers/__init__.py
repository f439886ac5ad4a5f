"""Diffusion denoisers: their schedules, networks and weights."""
