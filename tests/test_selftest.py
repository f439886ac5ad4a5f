"""The command: a table and exit code 0, or 6 where theory is contradicted; 2 and 4 for a device that is not there."""

import subprocess
import sys

import pytest

from cadis_ray import selftest
from cadis_ray.errors import EnvironmentProblem, ExitCode, IntegrityError, UsageError
from cadis_ray.smoothing import sampling

gaussian = sampling.gaussian


def test_a_line_for_every_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    selftest.selftest(replicates=60, seed=3)
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["classifier", "p_A", "votes", "false", "expected", "coverage", "mean", "dispersion",
                              "flags"]  # fmt: skip
    kinds = ["tie, denoised", "tie, black box", "sphere, denoised", "sphere, black box", "tie, local", "dense, local"]
    assert [row.split("  ")[0] for row in rows] == ["axis", "axis tail", "dense", "tie", "sphere", *kinds]
    assert rows[3].split()[1] == "0.50000"
    assert {row.index("-", header.index("flags")) for row in rows} == {header.index("flags")}


def test_flags_end_with_the_code_of_integrity(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sampling, "gaussian", lambda *arguments: gaussian(*arguments) / 2)
    with pytest.raises(IntegrityError, match=r"axis \(CMD\).*cannot be trusted") as refused:
        selftest.selftest(replicates=60)
    assert refused.value.exit_code == ExitCode.INTEGRITY
    assert capsys.readouterr().out.count("CMD") >= 3


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="--device nowhere: "):
        selftest.selftest(device="nowhere")
    with pytest.raises(EnvironmentProblem, match="--device cuda:99: "):
        selftest.selftest(device="cuda:99")


@pytest.mark.process
def test_help_answers_without_torch() -> None:
    code = (
        "import sys\nsys.argv = ['selftest', '--help']\nfrom cadis_ray import selftest\n"
        "try:\n    selftest.command(selftest.selftest)\n"
        "except SystemExit as end:\n    assert end.code == 0\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--replicates" in done.stdout
