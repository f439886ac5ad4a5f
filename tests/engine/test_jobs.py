"""Jobs on a head started as documented, with token authentication, whose workers an autoscaler starts and stops."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray.util
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from cadis_ray.smoothing.counts import CountsStore
from cadis_ray.storage.ledger import Ledger
from tests.helpers.engine import epochs_recorded, small_study, write_study
from tests.helpers.places import ROOT

pytestmark = pytest.mark.nodes

LIMIT = 600
RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class Head:
    dashboard: str
    environment: dict[str, str]
    token: str

    def jobs(self, *arguments: str, **changes: str) -> subprocess.Popen[str]:
        """`ray job ARGUMENTS`, its output kept; a change of "" takes a variable away."""
        environment = {key: value for key, value in (self.environment | changes).items() if value}
        command, pipe = [str(RAY), "job", *arguments], subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def get(self, path: str, token: str | None) -> dict:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with urllib.request.urlopen(urllib.request.Request(self.dashboard + path, headers=headers)) as answer:
            return json.load(answer)

    def workers(self) -> int:
        """Nodes alive besides the head."""
        nodes = self.get("/api/v0/nodes", self.token)["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" and not node["is_head_node"] for node in nodes)


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """The commands of docs/scaling.md and clusters/local.yaml, "without an ssh server", but for free ports, and with
    an autoscaling configuration: Ray's own autoscaler v2, whose machines are processes here."""
    port, dashboard, client, agent = free_ports(4)
    home = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    home |= {"HOME": str(tmp_path), "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    home |= {"PYTHONPATH": str(ROOT)}
    made = "ray get-auth-token --generate > /dev/null; chmod 600 ~/.ray/auth_token"
    assert made in (ROOT / "docs" / "scaling.md").read_text()
    subprocess.run(["bash", "-c", made], env=home, check=True)
    scaling = tmp_path / "autoscaling.yaml"
    scaling.write_text(yaml.safe_dump(autoscaling(f"{ray.util.get_node_ip_address()}:{port}")))
    command = yaml.safe_load((ROOT / "clusters" / "local.yaml").read_text())["head_start_ray_commands"][-1]
    for documented, here in (
        ("~/cadis-ray/.venv/bin/ray", f"exec {shlex.quote(str(RAY))}"),
        ("--port=6379", f"--port={port} --num-cpus=0 --block"),
        (
            "--dashboard-port=8265",
            f"--dashboard-port={dashboard} --ray-client-server-port={client} --dashboard-agent-listen-port={agent}",
        ),
        ("~/ray_bootstrap_config.yaml", shlex.quote(str(scaling))),
    ):
        assert documented in command
        command = command.replace(documented, here)
    environment = home | {
        "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_raylet_start_wait_time_s": "300", "RAY_agent_register_timeout_ms": "300000",  # if the machine is busy
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(["bash", "-c", command], env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{dashboard}"
    client_environment = home | {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": url}
    started = Head(url, client_environment, (tmp_path / ".ray" / "auth_token").read_text().strip())

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "head.log").read_text()
        try:
            return started.workers() == 0
        except OSError:
            return False

    def takes_jobs() -> bool:
        """Its agent starts after it."""
        return ended(started.jobs("submit", "--submission-id", "nothing", "--", "true"))[0] == 0

    try:
        until(answers)
        until(takes_jobs)
        yield started
    finally:
        end(process)


def autoscaling(address: str) -> dict:
    """A head without CPUs, and workers from nothing."""
    return {
        "cluster_name": "fake", "max_workers": 2, "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external", "launch_multiple": True, "gcs_address": address, "head_node_id": FAKE_HEAD_NODE_ID,
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 3}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "initialization_commands": [],
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
        "head_start_ray_commands": [], "worker_start_ray_commands": [],
    }  # fmt: skip


def end(head: subprocess.Popen[bytes]) -> None:
    """End a head and all that it started, by process id; what is still there 3 s after SIGTERM is killed."""
    family = [] if head.poll() is not None else psutil.Process(head.pid).children(recursive=True)
    for process in (head, *family):
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=3)
    for process in (head, *alive):
        process.kill()
    head.wait()
    psutil.wait_procs(alive, timeout=30)


def until(reached: Callable[[], bool], limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = job.communicate(timeout=LIMIT)
    return job.returncode, output


def trials(folder: Path) -> list:
    with Ledger(folder / "ledger.sqlite") as ledger:
        return [(row.number, row.name, row.state, row.parameters, row.ended) for row in ledger.trials()]


def test_a_job_stopped_and_submitted_again_on_workers_that_come_and_go(head: Head, tmp_path: Path) -> None:
    """From no worker to some and back; the token; stop, again, and once more; the log's lines of progress."""
    folder = tmp_path / "run"
    small = small_study(concurrent_trials=1, actors=1) | {"trials": 2, "baselines": {}}
    study = write_study(tmp_path / "small.yaml", small)

    def submit(name: str, **changes: str) -> subprocess.Popen[str]:
        # No --working-dir: the pretended machines share one folder for it, and each that comes empties it.
        run = ["python", "-m", "cadis_ray.tune", str(study), "--out", str(folder)]
        return head.jobs("submit", "--submission-id", name, "--", *run, **changes)

    def state(name: str) -> dict:
        return head.get(f"/api/jobs/{name}", head.token)

    with pytest.raises(urllib.error.HTTPError, match="401"):
        head.get("/api/jobs/", None)
    with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
        head.get("/api/jobs/", "0" * 64)
    code, output = ended(submit("anybody", RAY_AUTH_MODE=""))
    assert code != 0
    assert "401" in output or "Unauthorized" in output or "authentication" in output.lower()
    assert [job["submission_id"] for job in head.get("/api/jobs/", head.token)] == ["nothing"]

    assert head.workers() == 0
    first = submit("first")
    until(lambda: epochs_recorded(folder) >= 1 or first.poll() is not None)
    assert first.poll() is None, first.communicate()[0]
    until(lambda: head.workers() >= 1)
    code, output = ended(head.jobs("stop", "first"))
    assert code == 0, output
    _, log = ended(first)
    assert state("first")["status"] == "STOPPED", log
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("interrupted", 130)
    assert re.search(r"^search: 0/2 done", log, re.MULTILINE), log

    code, log = ended(submit("second"))
    assert code == 0, log
    assert state("second")["status"] == "SUCCEEDED"
    assert json.loads((folder / "result.json").read_text())["status"] == "done"
    assert re.search(r"^search: 2/2 done.*best ACR estimate \d", log, re.MULTILINE), log
    assert re.search(r"^certification: (\d+)/\1 done", log, re.MULTILINE), log

    before = trials(folder), CountsStore(folder / "counts").load().keys()
    assert [name for _, name, *_ in before[0]] == ["trial-0000", "trial-0001"]
    code, log = ended(submit("third"))
    assert code == 0, log
    assert "is done" in log
    assert (trials(folder), CountsStore(folder / "counts").load().keys()) == before
    until(lambda: head.workers() == 0)
