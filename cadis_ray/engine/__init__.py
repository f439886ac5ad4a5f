"""The study on Ray: the only modules that import it. Each adapts a function of the science to it."""

import os

# Ray's own switches, which have no setting, and which it reads when it is imported.
os.environ |= {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # would write every trial's counts as text
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # would end the process with 0
    "RAY_AIR_NEW_OUTPUT": "0",  # would print tables between our lines
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started on node",  # so many is what the study asks for
    "RAY_prestart_worker_first_driver": "0",  # as many idle processes as logical CPUs
}
