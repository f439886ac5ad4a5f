"""A model of a run as files that need neither the run nor this program's checkpoints."""
