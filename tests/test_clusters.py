"""The cluster files are what Ray, KubeRay and the lock say; the lint catches each line that would make them unsafe."""

import copy
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cadis_ray.clusters import problems
from tests.helpers.places import ROOT

FILES = sorted(path for path in (ROOT / "clusters").iterdir() if path.suffix in (".yaml", ".sh"))
LAUNCHED = ("local.yaml", "on_premises.yaml", "aws_gpu.yaml", "gcp_gpu.yaml")
KUBERAY = {"kuberay_cluster.yaml": "ray.io_rayclusters.yaml", "kuberay_job.yaml": "ray.io_rayjobs.yaml"}
CRDS = ROOT.parent / "shared" / "reference" / "kuberay"

MODE = "export RAY_AUTH_MODE=token"
AWS_HEAD = "available_node_types.head.node_config"
CONTAINER = "template.spec.containers[0]"
SCRIPT = (ROOT / "clusters" / "slurm.sh").read_text()
SLURM_HEAD = f"{1 + SCRIPT.count(chr(10), 0, SCRIPT.index(' start --head'))}:1"


def document(name: str) -> Any:
    return next(yaml.safe_load_all((ROOT / "clusters" / name).read_text()))


def shell(path: Path) -> list[str]:
    """Every shell command of a script, or of a launcher's file."""

    def commands(value: Any, key: str = "") -> Iterator[str]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from commands(inner, name)
        elif isinstance(value, list) and key.endswith("commands"):
            yield from value

    return [path.read_text()] if path.suffix == ".sh" else list(commands(document(path.name)))


def stated(file: str, pattern: str) -> str:
    found = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_nothing_is_missing() -> None:
    assert {path.name for path in FILES} == {*LAUNCHED, *KUBERAY, "slurm.sh"}


@pytest.mark.process
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_passes_is_shell_and_says_what_it_costs_and_how_it_is_used(path: Path) -> None:
    assert problems(path) == []
    header = path.read_text().split("\napiVersion" if path.name in KUBERAY else "\ncluster_name")[0]
    assert "Cost per hour" in header
    for command in {"slurm.sh": ("sbatch", "scancel")}.get(path.name, ("ray up", "ray job submit", "ray down")):
        assert command in header
    for command in shell(path):
        read = subprocess.run(["bash", "-n"], input=command, text=True, capture_output=True)
        assert (read.returncode, read.stderr) == (0, ""), command


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_s_launcher_takes_the_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(document(name))))


def closed(schema: Any) -> Any:
    """The schema with unknown keys refused, as the API server does with `kubectl apply`."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_s_schema_takes_the_file_and_refuses_a_slip(name: str) -> None:
    import jsonschema

    if not (crd := CRDS / KUBERAY[name]).exists():
        pytest.skip("KubeRay's CRD schemas are not here")
    definition = yaml.load(crd.read_text(), yaml.CSafeLoader)
    schema = next(one["schema"]["openAPIV3Schema"] for one in definition["spec"]["versions"] if one["name"] == "v1")
    for top in ("metadata", "apiVersion", "kind"):  # described elsewhere
        schema["properties"][top] = {}
    checker = jsonschema.Draft7Validator(closed(schema))
    data = document(name)
    assert [error.message for error in checker.iter_errors(data)] == []
    cluster = data["spec"].get("rayClusterSpec", data["spec"])
    cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    cluster["autoscalerOptions"]["version"] = "v3"
    paths = [error.absolute_path[-1] for error in checker.iter_errors(data)]
    assert sorted(map(str, paths)) == ["0", "version"]


@pytest.mark.parametrize("path", [*FILES, ROOT / "clusters" / "Dockerfile"], ids=lambda path: path.name)
def test_ray_and_python_are_those_of_the_lock(path: Path) -> None:
    text = path.read_text()
    ray, python = stated("requirements.lock", r"^ray==(\S+)"), stated("Makefile", r"--python-version (\d+\.\d+)")
    images = re.findall(r"(?:cadis-ray|rayproject/ray):(\S+)", text)
    checks = re.findall(r'found != \("(\S+)", \((\d+), (\d+)\)\)', text)
    assert set(images) <= {f"{ray}-py{python.replace('.', '')}"}
    assert set(checks) <= {(ray, *python.split("."))}
    assert images or checks
    assert set(re.findall(r'rayVersion: "(\S+)"', text)) == ({ray} if path.name in KUBERAY else set())


@pytest.mark.process
@pytest.mark.parametrize("name", ["local.yaml", "on_premises.yaml"])
def test_a_node_with_another_ray_does_not_start(name: str) -> None:
    check = document(name)["setup_commands"][0]
    here = re.sub(r"^\S+/python", sys.executable, check)
    assert subprocess.run(["bash", "-c", here], capture_output=True).returncode == 0
    other = subprocess.run(["bash", "-c", here.replace("2.60.0", "2.59.0")], capture_output=True, text=True)
    assert other.returncode == 1
    assert "found ('2.60.0', (3, 11))" in other.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_installed_ray_has_every_option_that_is_used(path: Path) -> None:
    from ray.dashboard.modules.job.cli import job_cli_group
    from ray.scripts.scripts import start

    text = path.read_text().replace("\\\n#", "").replace("\\\n", "")
    starts = re.findall(r"ray\"? start ([^;&]*)", "\n".join(shell(path)).replace("\\\n", ""))
    starts += re.findall(r"^common=\(.*\)$", text, re.MULTILINE)
    used = re.findall(r"(?<![^\s(])--[a-z-]+", " ".join(starts))
    known = {option for parameter in start.params for option in parameter.opts}
    assert set(used) <= known
    assert bool(used) == (path.name not in KUBERAY)
    submitted = re.findall(r"ray job submit (.*?)-- ", text, re.DOTALL)
    known = {option for parameter in job_cli_group.commands["submit"].params for option in parameter.opts}
    assert {option for line in submitted for option in re.findall(r"--[a-z-]+", line)} <= known


# (file, what is replaced, by what, the key that the lint must name, a word of the rule)
BROKEN = [
    ("local.yaml", "max_workers: 0", "max_worker: 0", "the study", "refused by Ray: "),
    ("on_premises.yaml", "192.168.10.10", "0.0.0.0", "provider.head_ip", "every address"),
    ("aws_gpu.yaml", "region: us-west-2\n", "region: '::/0'\n", "provider.region", "every address"),
    ("aws_gpu.yaml", f"{MODE};", f"{MODE} RAY_AUTH_TOKEN=0123abcd;", "worker_start_ray_commands[1]", "plain text"),
    ("on_premises.yaml", ": ~/.ray/auth", ": 0123abcd", "file_mounts.~/.ray/auth_token", "plain text"),
    ("local.yaml", "ssh_user: me", "ssh_user: '-----BEGIN OPENSSH PRIVATE KEY-----'", "auth.ssh_user", "plain text"),
    ("aws_gpu.yaml", "us-west-2a", "AKIAABCDEFGHIJKLMNOP", "provider.availability_zone", "plain text"),
    ("aws_gpu.yaml", "us-west-2a", "hf_abcdefghijklmnopqrst", "provider.availability_zone", "plain text"),
    ("aws_gpu.yaml", "us-west-2a", "https://me:word@host", "provider.availability_zone", "plain text"),
    ("kuberay_cluster.yaml", "RAY_JOB_STOP_SIGNAL", "RAY_AUTH_TOKEN", f"{CONTAINER}.env[0].value", "plain text"),
    ("kuberay_job.yaml", "kind: NetworkPolicy", "kind: Secret", "kind", "plain text"),
    *(("aws_gpu.yaml", "container_name:", f"{key}: ray:latest\n  container_name:", f"docker.{key}", "DIGEST")
      for key in ("head_image", "worker_image")),
    ("kuberay_job.yaml", "cadis-ray:2.60.0-py311", "cadis-ray:py311", f"headGroupSpec.{CONTAINER}.image", "DIGEST"),
    ("gcp_gpu.yaml", "global/images", "global/images/family", "initializeParams.sourceImage", "one image"),
    ("on_premises.yaml", "idle_timeout_minutes: 10\n", "", "idle_timeout_minutes", "above 0"),
    ("gcp_gpu.yaml", "idle_timeout_minutes: 5", "idle_timeout_minutes: .inf", "idle_timeout_minutes", "above 0"),
    ("gcp_gpu.yaml", "head_start_ray_commands:", "head_setup:", "head_start_ray_commands", "nothing"),
    ("aws_gpu.yaml", "worker_start_ray_commands:", "head_setup:", "worker_start_ray_commands", "nothing"),
    ("gcp_gpu.yaml", "\nsetup_commands: []", "", "setup_commands", "unpinned"),
    ("aws_gpu.yaml", "head_setup_commands: []", "", "head_setup_commands", "unpinned"),
    ("aws_gpu.yaml", "use_internal_ips: true", "use_internal_ips: false", "provider.use_internal_ips", "public"),
    ("aws_gpu.yaml", "ami-0123456789abcdef0", "latest_dlami", f"{AWS_HEAD}.ImageId", "ami-"),
    ("aws_gpu.yaml", "SecurityGroupIds: [sg-0123456789abcdef0]\n", "\n", f"{AWS_HEAD}.SecurityGroupIds", "ssh"),
    ("aws_gpu.yaml", "HttpTokens: required, ", "", f"{AWS_HEAD}.MetadataOptions.HttpTokens", "IMDSv2"),
    ("aws_gpu.yaml", "IamInstanceProfile: {Name: cadis-ray-head}\n", "\n", f"{AWS_HEAD}.IamInstanceProfile", "EC2"),
    ("gcp_gpu.yaml", "networkInterfaces:", "networks:", f"{AWS_HEAD}.networkInterfaces", "public address"),
    ("gcp_gpu.yaml", "- subnetwork:", "- accessConfigs: [{type: ONE_TO_ONE_NAT}]\n          subnetwork:",
     f"{AWS_HEAD}.networkInterfaces[0].accessConfigs", "public address"),
    ("kuberay_cluster.yaml", "    mode: token", "    mode: disabled", "spec.authOptions.mode", "'disabled'"),
    ("kuberay_job.yaml", "enableInTreeAutoscaling: true", "", "spec.rayClusterSpec.enableInTreeAutoscaling", "cost"),
    ("kuberay_job.yaml", "version: v2", "version: v1", "spec.rayClusterSpec.autoscalerOptions.version", "v2"),
    ("kuberay_cluster.yaml", "idleTimeoutSeconds: 300", "", "spec.autoscalerOptions.idleTimeoutSeconds", "above 0"),
    ("kuberay_job.yaml", "ClusterIP", "LoadBalancer", "spec.rayClusterSpec.headGroupSpec.serviceType", "ClusterIP"),
    ("kuberay_cluster.yaml", "serviceType:", "enableIngress: true\n    serviceType:",
     "spec.headGroupSpec.enableIngress", "dashboard"),
    ("kuberay_cluster.yaml", "dashboard-host: 127.0.0.1", "dashboard-host: 10.0.0.1",
     "spec.headGroupSpec.rayStartParams.dashboard-host", "127.0.0.1"),
    ("kuberay_job.yaml", "\n  backoffLimit: 2", "\n  backoffLimit: 11", "spec.backoffLimit", "0 to 10"),
    ("kuberay_job.yaml", "JobFinishes: true", "JobFinishes: false", "spec.shutdownAfterJobFinishes", "costs"),
    ("kuberay_job.yaml", "ttlSecondsAfterFinished: 600", "", "spec.ttlSecondsAfterFinished", "above 0"),
    ("kuberay_job.yaml", "activeDeadlineSeconds: 86400", "", "spec.activeDeadlineSeconds", "above 0"),
    *(("kuberay_job.yaml", "runAsNonRoot: true", "", f"{pod}.spec.securityContext.runAsNonRoot", "true")
      for pod in ("headGroupSpec.template", "workerGroupSpecs[0].template", "spec.submitterPodTemplate")),
    *(("kuberay_job.yaml", old, "x: ", f"{container}.{key}", word)
      for container in (f"headGroupSpec.{CONTAINER}", f"workerGroupSpecs[0].{CONTAINER}",
                        "spec.submitterPodTemplate.spec.containers[0]", "spec.rayClusterSpec.autoscalerOptions")
      for old, key, word in (("allowPrivilegeEscalation: false", "securityContext.allowPrivilegeEscalation", "false"),
                             ("readOnlyRootFilesystem: true", "securityContext.readOnlyRootFilesystem", "/tmp"),
                             ("drop: [ALL]", "securityContext.capabilities.drop", "ALL"),
                             ("cpu:", "resources.limits.cpu", "starve"),
                             ("memory:", "resources.limits.memory", "starve"))),
    ("kuberay_cluster.yaml", "kind: NetworkPolicy", "kind: ConfigMap", "kind", "NetworkPolicy"),
    ("kuberay_job.yaml", "- from:\n        - podSelector: *pods", "- {}", "spec.ingress[0].from", "everybody"),
    ("kuberay_job.yaml", "- podSelector: *pods", "- {}", "spec.ingress[0].from[0]", "everybody"),
    ("local.yaml", f"{MODE} ", "export ", "head_start_ray_commands[0]", "RAY_AUTH_MODE=token"),
    ("on_premises.yaml", f"{MODE};\n", "true;\n", "worker_start_ray_commands[0]", "RAY_AUTH_MODE=token"),
    ("aws_gpu.yaml", "ray start", "RAY_AUTH_MODE=off ray start", "head_start_ray_commands[1]", "RAY_AUTH_MODE=token"),
    ("local.yaml", "--dashboard-host=127.0.0.1", "", "head_start_ray_commands[0]", "a tunnel"),
    ("aws_gpu.yaml", "host=127.0.0.1", "host=10.0.0.7", "head_start_ray_commands[1]", "a tunnel"),
    ("slurm.sh", f"{MODE}\n", f"# {MODE}\n", SLURM_HEAD, "RAY_AUTH_MODE=token"),
    ("slurm.sh", "--dashboard-host=127.0.0.1", "--dashboard-host=$ip", SLURM_HEAD, "a tunnel"),
    ("slurm.sh", "RAY_AUTH_TOKEN_PATH=$HOME", "RAY_AUTH_TOKEN=0123abcd # ", "", "plain text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "key", "rule"), BROKEN, ids=[f"{row[0]}-{row[3]}" for row in BROKEN])
def test_the_lint_catches_each_unsafe_line(name: str, old: str, new: str, key: str, rule: str, tmp_path: Path) -> None:
    text = (ROOT / "clusters" / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new))
    found = problems(tmp_path / name)
    assert any(line.startswith(f"{tmp_path / name}:") and f"{key}: " in line and rule in line for line in found), found


def test_the_lint_names_the_line_in_every_document_of_a_file(tmp_path: Path) -> None:
    text = (ROOT / "clusters" / "kuberay_job.yaml").read_text().replace("policyTypes: [Ingress]", "policyTypes: []")
    (tmp_path / "job.yaml").write_text(text)
    line = 1 + text[: text.index("policyTypes:")].count("\n")
    (found,) = problems(tmp_path / "job.yaml")
    assert found.startswith(f"{tmp_path / 'job.yaml'}:{line}:3: spec.policyTypes: got a list; need Ingress: ")


@pytest.mark.process
def test_the_command_says_all_at_once_and_exits_2(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("cluster_name: x\nprovider: {type: aws, region: 7}\n")
    command = [sys.executable, "-m", "cadis_ray.clusters", "check", str(FILES[0]), str(bad), str(FILES[-1])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert all(line.startswith(f"{bad}:") for line in done.stderr.splitlines())
    for expected in ("2:23: provider.region: refused by Ray: 7 is not", "head_start_ray_commands: got", "idle_timeout"):
        assert expected in done.stderr
    command.remove(str(bad))
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0


def test_the_upload_has_the_package_and_neither_secrets_nor_data(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    (tmp_path / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    ignored = get_excludes_from_ignore_files(tmp_path, include_gitignore=True)
    names = ("cadis_ray/data/digits.py", "cadis_ray/models/embedded/digits_denoiser.safetensors", "cadis_ray/tune.py",
             "search_spaces/digits.yaml", "requirements.lock", "data/cifar10.parquet", "checkpoints/w.safetensors",
             "runs/digits/ledger.sqlite", ".git/config", ".venv/bin/python", ".env", ".env.production", "key.pem",
             "sub/id_ed25519", ".ray/auth_token", "auth_token_7", "tests/test_tune.py")  # fmt: skip
    kept = []
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
        path = tmp_path / name
        parts = [path, *(parent for parent in path.parents if tmp_path in parent.parents)]
        if not any(exclude(part) for exclude in ignored for part in parts):
            kept.append(name)
    assert kept == list(names[:5])


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "srun $1" >> "$LOG/srun"; shift; done
exec "$@"
"""
RAY = """#!/bin/bash
name=$([[ $2 == --head ]] && echo head || echo worker)
trap 'kill $!; echo ended >> "$LOG/$name"; exit 0' TERM
echo "$RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $*" > "$LOG/$name"
sleep 3600 & wait
"""
PYTHON = """#!/bin/bash
case $1 in
    -c) [[ $2 == *secrets* ]] && exec "$REAL_PYTHON" "$@"; exit 0 ;;
    -) cat > "$LOG/wait.py"; for name in head worker; do until [[ -s $LOG/$name ]]; do :; done; done ;;
    -m) trap 'kill $!; echo saved >> "$LOG/driver"; exit 143' TERM
        echo "$*" > "$LOG/driver"
        [[ -n ${CODE:-} ]] && exit "$CODE"
        sleep 3600 & echo started > "$LOG/started"; wait ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which slurm.sh runs with a pretended Slurm and Ray, which write down how they were called."""
    programs = {"bin/srun": SRUN, ".venv/bin/ray": RAY, ".venv/bin/python": PYTHON,
                "bin/scontrol": "#!/bin/bash\necho first\nsleep .05\necho second\n",
                "bin/getent": "#!/bin/bash\n[[ $2 == first ]] && echo '10.1.2.3 STREAM first'\n"}  # fmt: skip
    for name, text in programs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    os.mkfifo(tmp_path / "started")
    return {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path), "LOG": str(tmp_path),
            "REAL_PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "71234",
            "SLURM_CPUS_PER_TASK": "16", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "both",
            "SLURM_JOB_NUM_NODES": "2"}  # fmt: skip


SLURM = ["bash", str(ROOT / "clusters" / "slurm.sh"), "study.yaml", "/shared/run"]


@pytest.mark.process
def test_slurm_starts_a_head_and_workers_with_a_token_and_keeps_the_study_s_exit_code(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(SLURM, env=slurm | {"CODE": "3"}, capture_output=True, text=True, timeout=30)
    assert done.returncode == 3, done.stderr
    head, worker = (tmp_path / "head").read_text(), (tmp_path / "worker").read_text()
    assert head.startswith("token 600 start --head --node-ip-address=10.1.2.3 --port=21234 --dashboard-host=127.0.0.1 ")
    assert worker.startswith("token 600 start --address=10.1.2.3:21234 --num-cpus=16 --num-gpus=1 ")
    assert head.endswith("--block\nended\n")
    assert worker.endswith("--block\nended\n")
    assert (tmp_path / "driver").read_text().split() == [
        "-m", "cadis_ray.tune", "study.yaml", "--address", "10.1.2.3:21234", "--out", "/shared/run",
    ]  # fmt: skip
    assert "--exclude=first" in (tmp_path / "srun").read_text()
    assert list((tmp_path / ".ray").iterdir()) == []
    compile((tmp_path / "wait.py").read_text(), "wait.py", "exec")


@pytest.mark.process
@pytest.mark.parametrize("program", ["scontrol", "getent", "srun"])
def test_slurm_leaves_no_token_behind_when_it_fails_early(slurm: dict[str, str], tmp_path: Path, program: str) -> None:
    (tmp_path / "bin" / program).write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / ".venv/bin/python").write_text(PYTHON.replace("until [[ -s $LOG/$name ]]; do :; done", "exit 1"))
    assert subprocess.run(SLURM, env=slurm, capture_output=True, timeout=30).returncode == 1
    assert list((tmp_path / ".ray").iterdir()) == []


@pytest.mark.process
def test_slurm_s_signal_lets_the_study_save_before_its_nodes_end(slurm: dict[str, str], tmp_path: Path) -> None:
    running = subprocess.Popen(SLURM, env=slurm)
    assert (tmp_path / "started").read_text() == "started\n"
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=30) == 143
    assert (tmp_path / "driver").read_text().endswith("saved\n")
    for node in ("head", "worker"):
        assert (tmp_path / node).read_text().endswith("ended\n")
    assert list((tmp_path / ".ray").iterdir()) == []
