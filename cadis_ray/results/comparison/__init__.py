"""Models of several runs, logs and published results beside each other."""
