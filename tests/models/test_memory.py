"""Memory that a process keeps."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from cadis_ray.models.memory import keep_freed_memory
torch.set_num_threads(1)
def faults():
    for _ in range(10):
        torch.zeros(12 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(12 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
freed = faults()
keep_freed_memory()
print(freed, faults())
"""


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_used_again_without_page_faults():
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    freed, kept = map(int, answer.stdout.split())
    assert kept < 100 < freed  # 48 MiB, more than glibc ever keeps of itself, are 12,288 pages
