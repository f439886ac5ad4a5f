"""A study on three machines, one of which is cut off: three network namespaces joined by clusters/on_premises.yaml.

    sudo .venv/bin/python benchmarks/namespaces.py [--study search_spaces/digits.yaml] [--out FOLDER]

Every namespace has an address of its own on a bridge, loopback, a /tmp/ray and ports of its own; the file system is
what they share. The head and the workers start with the file's commands "by hand", with token authentication; the
study is submitted as a job on the head's loopback. Once a trial has recorded an epoch, the link of a node that trains
is taken down. The same study then runs undisturbed on a Ray of one machine. Prints a line of JSON: whether the trials,
their votes and the blocks of the certification are equal; ends with 0 if so, else with 1. Where namespaces are not
allowed, the line says why it is skipped, and it ends with 0. Needs `ip` (Debian: iproute2) and root. Everything that it
starts ends with it, by process id.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from resume import evidence

from cadis_ray.storage.ledger import Ledger

REPOSITORY = Path(__file__).parents[1]
SWITCH, NODES = f"cadis-{os.getpid()}-switch", {f"cadis-{os.getpid()}-{i}": f"10.77.0.{i + 1}" for i in range(3)}
HEAD, *WORKERS = NODES
# Three nodes start on one machine.
PATIENT = {"RAY_raylet_start_wait_time_s": "300", "RAY_agent_register_timeout_ms": "300000"}
LIMIT = 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, help="default: digits with fewer trials, images and samples")
    parser.add_argument("--out", type=Path, help="default: a temporary folder")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started is ended
    if reason := refused():
        print(json.dumps({"skipped": reason}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        out = (arguments.out or Path(temporary)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        study = yaml.safe_load(arguments.study.read_text()) if arguments.study else small()
        line = compared(study, out)
    print(json.dumps(line))
    sys.exit(0 if line["equal"] else 1)


def refused() -> str | None:
    """Why there can be no namespaces here."""
    if not shutil.which("ip"):
        return "there is no `ip`; install iproute2"
    done = ip("netns", "add", SWITCH, check=False)
    if done.returncode:
        return f"network namespaces are not allowed: {done.stderr.strip()}"
    ip("netns", "delete", SWITCH)
    return None


def small() -> dict[str, Any]:
    """Digits, of a size that two nodes of one CPU finish in minutes."""
    study = yaml.safe_load((REPOSITORY / "search_spaces" / "digits.yaml").read_text())
    study |= {"name": "namespaces", "trials": 2, "sampler": {"name": "random"}, "objective": {"maximise": "acr"}}
    study["base"]["finetuning"] |= {"epochs": 4}
    study["base"]["validation"] |= {"images": 60, "samples": 8}
    study["base"]["certification"] |= {"images": 40}
    study["baselines"] = {"off_the_shelf": {"finetuning.recipe": "none"}}
    return study


def compared(study: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run the study on nodes and on one machine; what was cut off, and whether the results are equal."""
    working = out / "clone"
    for name in ("cadis_ray", "search_spaces"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, working / name, ignore=ignored, dirs_exist_ok=True)
    (working / "study.yaml").write_text(yaml.safe_dump(study))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(out), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    started = time.monotonic()
    with machines(), rays(out, environment):
        lost = on_nodes(working, out, environment)
    seconds = round(time.monotonic() - started)
    if code := tune(working, out / "alone", environment | PATIENT, "--address", "local").wait():
        sys.exit(f"the study on one machine ended with {code}")
    found, expected = evidence(out / "nodes"), evidence(out / "alone")
    numbers = {"trials": len(expected["trials"]), "sources": len(expected["votes"]), "seconds": seconds}
    return {"equal": found == expected and bool(expected["votes"])} | numbers | lost


@contextmanager
def machines() -> Iterator[None]:
    """The namespaces, each with an address on one bridge, which has a namespace too: the host's network is not
    touched. On leaving, what runs in them is ended by process id."""
    ip("netns", "add", SWITCH)
    try:
        ip("-n", SWITCH, "link", "add", "bridge", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "bridge", "up")
        for node, address in NODES.items():
            port = "port" + address.rsplit(".", 1)[1]
            ip("netns", "add", node)
            ip("-n", SWITCH, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", node)
            ip("-n", SWITCH, "link", "set", port, "master", "bridge", "up")
            ip("-n", node, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", node, "link", "set", device, "up")
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = [int(pid) for node in NODES for pid in ip("netns", "pids", node, check=False).stdout.split()]
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(3 if left else 0)
        for name in (SWITCH, *NODES):
            ip("netns", "delete", name, check=False)


@contextmanager
def rays(out: Path, environment: dict[str, str]) -> Iterator[None]:
    """Ray by the file's commands: paths are this checkout's, each node has its own address, and the head no CPU."""
    made = "ray get-auth-token --generate > /dev/null; chmod 600 ~/.ray/auth_token"
    subprocess.run(["bash", "-c", made], env=environment, check=True)
    documented = yaml.safe_load((REPOSITORY / "clusters" / "on_premises.yaml").read_text())
    with (out / "rays.log").open("w") as log:
        for node, address in NODES.items():
            [command] = documented["head_start_ray_commands" if node == HEAD else "worker_start_ray_commands"]
            command = command.replace("/mnt/shared/cadis-ray/.venv/bin/ray", str(Path(sys.executable).parent / "ray"))
            command = command.replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
            command += f" --node-ip-address={address} --num-cpus={0 if node == HEAD else 1} --block"
            command = f"mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && {command}"
            ray = inside(
                node,
                ["bash", "-c", command],
                environment | PATIENT | {"RAY_HEAD_IP": NODES[HEAD]},
                stdout=log,
                stderr=log,
            )
            until(lambda node=node, ray=ray: listens(ray, node, environment))
        yield


def listens(ray: subprocess.Popen[str], node: str, environment: dict[str, str]) -> bool:
    """Whether a node runs: its Ray has started a process to look after it and, on the head, takes jobs on loopback."""
    if ray.poll() is not None:
        sys.exit(f"Ray on {NODES[node]} ended with {ray.returncode}; see rays.log")
    if node == HEAD:
        return jobs(environment, "submit", "--", "true").wait() == 0
    return any(title.startswith(b"ray::") for title in titles(node))


def on_nodes(working: Path, out: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Submit the study, cut a node off that trains, wait for the end."""
    run = ["python", "-m", "cadis_ray.tune", "study.yaml", "--out", str(out / "nodes")]
    with (out / "job.log").open("w") as log:
        job = jobs(environment, "submit", "--working-dir", str(working), "--", *run, stdout=log)
        until(lambda: job.poll() is not None or (epochs(out / "nodes") > 1 and any(map(trains, WORKERS))))
        node = next((node for node in WORKERS if trains(node)), None)
        before = epochs(out / "nodes")
        if node is None:
            sys.exit("the job ended, or stopped training, before a node could be cut off; see job.log")
        ip("-n", SWITCH, "link", "set", "port" + NODES[node].rsplit(".", 1)[1], "down")
        if code := job.wait():
            sys.exit(f"the job ended with {code}; see job.log")
    return {"cut_off": NODES[node], "epochs_recorded_then": before}


def jobs(environment: dict[str, str], *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = ["ray", "job", arguments[0], "--address", "http://127.0.0.1:8265", *arguments[1:]]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT} | options
    return inside(HEAD, command, environment | {"RAY_AUTH_MODE": "token"}, **quiet)


def trains(node: str) -> bool:
    """Whether a trial runs there: its process calls itself after Tune's class."""
    return any(title.startswith(b"ray::") and b".train" in title for title in titles(node))


def titles(node: str) -> list[bytes]:
    """What the processes of a node call themselves."""
    found = []
    for pid in ip("netns", "pids", node).stdout.split():
        with suppress(OSError):
            found.append((Path("/proc") / pid / "cmdline").read_bytes())
    return found


def tune(working: Path, folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cadis_ray.tune", "study.yaml", "--out", str(folder), *arguments]
    return subprocess.Popen(command, cwd=working, env=environment, text=True, stdout=sys.stderr)


def epochs(folder: Path) -> int:
    """How many the ledger holds."""
    if not (folder / "ledger.sqlite").exists():
        return 0
    with Ledger(folder / "ledger.sqlite") as ledger:
        return sum(len(ledger.epochs(row.number)) for row in ledger.trials())


def inside(node: str, command: list[str], environment: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(["ip", "netns", "exec", node, *command], env=environment, text=True, **options)


def ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not reached():
        if time.monotonic() > deadline:
            sys.exit(f"not reached in {LIMIT} s")
        time.sleep(0.5)


if __name__ == "__main__":
    main()
