"""The losses that fine-tuning can minimise, one family a module."""
