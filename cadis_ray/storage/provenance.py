"""What made a result: this program's commit, the packages it ran with, the machine."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "timm", "transformers", "peft", "optuna", "mlflow", "numpy", "scipy", "safetensors")


def versions() -> dict[str, str]:
    """Python's version and those of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit this package was run from, with ``+changes`` where files differ; None outside a checkout."""
    folder = Path(str(files("cadis_ray")))

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder.parent:
            return None  # installed into the checkout of something else
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    """This machine: system, processor, logical CPUs, memory, GPUs by name. Asks the driver of the GPUs, not CUDA: that
    would take a context on one of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
        gpus = done.stdout.splitlines() if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        gpus = []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"system": platform.platform(), "processor": processor, "cpus": os.cpu_count(),
            "memory_gib": round(memory / 2**30, 1), "gpus": gpus}  # fmt: skip
