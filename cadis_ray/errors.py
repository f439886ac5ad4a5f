"""Errors that a user can cause, each with the exit code that names its kind."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command; the same number stands in ``result.json``."""

    DONE = 0
    INTERNAL = 1
    USAGE = 2
    TRIALS_FAILED = 3
    ENVIRONMENT = 4
    DATA = 5
    INTEGRITY = 6
    SIGINT = 130
    SIGTERM = 143


class CadisError(Exception):
    """A message for the user; printed without a traceback."""

    exit_code: ExitCode = ExitCode.INTERNAL


class UsageError(CadisError):
    """A study file or an argument is wrong; the message lists every problem, one a line."""

    exit_code = ExitCode.USAGE


class TrialsFailed(CadisError):
    """A study was finished, but more of its trials failed than it tolerates."""

    exit_code = ExitCode.TRIALS_FAILED


class EnvironmentProblem(CadisError):
    """Ray, the storage or the hardware cannot do what the study asks."""

    exit_code = ExitCode.ENVIRONMENT


class DataError(CadisError):
    """Data or a checkpoint is refused."""

    exit_code = ExitCode.DATA


class IntegrityError(CadisError):
    """Stored evidence contradicts itself, or another driver holds the run."""

    exit_code = ExitCode.INTEGRITY
