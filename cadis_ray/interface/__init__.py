"""What every module shows outside: sections of the study file, progress, signals, exit codes."""
