"""One Ray for the whole test session."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.engine import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    import cadis_ray.engine  # noqa: F401, its switches are read when ray is imported

    # The python of a job's command is found there.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    import ray

    info = ray.init(
        address="local", num_cpus=8, include_dashboard=True, log_to_driver=False, logging_level=logging.ERROR
    )
    try:
        yield Cluster(ray.get_runtime_context().gcs_address, f"http://{info.dashboard_url}")
    finally:
        ray.shutdown()
