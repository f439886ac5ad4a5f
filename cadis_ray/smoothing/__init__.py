"""Randomised smoothing: addressed noise, votes, counts, and what follows from counts."""
