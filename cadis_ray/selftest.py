"""``python -m cadis_ray.selftest``: does certification on this machine do what theory says?"""

from typing import TYPE_CHECKING, Annotated

import typer

from cadis_ray.errors import EnvironmentProblem, IntegrityError, UsageError
from cadis_ray.interface.command import command

if TYPE_CHECKING:
    from cadis_ray.certification.battery import Finding

HEADER = ("classifier", "p_A", "votes", "false", "expected", "coverage", "mean", "dispersion", "flags")


def selftest(
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:NUMBER.")] = "cpu",
    replicates: Annotated[
        int, typer.Option(min=1, help="Certificates of each classifier; fewer see only gross faults.")
    ] = 1500,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Root of the noise.")] = 0,
) -> None:
    """Certify classifiers whose exact radius is known, many times, and compare with theory.

    Columns: the exact p_A and the share of votes found; certificates beyond the exact radius and how many theory
    expects; p-values of coverage (C), mean (M) and dispersion (D) of the votes. A p-value below 1e-4 is flagged and
    ends with exit code 6: do not certify on this machine. Six are of the other
    kinds of base classifier: denoised, local smoothing, black box. About a minute on one core.

    Example:

      python -m cadis_ray.selftest --device cuda
    """
    import torch

    from cadis_ray.certification.battery import run

    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: need cpu, cuda or cuda:NUMBER")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentProblem(f"--device {device}: {str(error).splitlines()[0]}") from None
    torch.set_num_threads(1)  # tensors this small only wait for each other's threads: minutes on a busy machine
    findings = run(replicates, seed, device)
    print("\n".join(lines(findings)))
    if wrong := [f"{finding.name} ({finding.flags})" for finding in findings if finding.flags]:
        raise IntegrityError(f"selftest: flagged: {', '.join(wrong)}. Certificates made here cannot be trusted.")


def lines(findings: list["Finding"]) -> list[str]:
    """The table, a line a classifier."""
    rows = [HEADER]
    rows += [
        (f.name, f"{f.probability:.5f}", f"{f.share:.5f}", str(f.false), f"{f.expected:.1f}",
         *(f"{p_value:.2g}" for p_value in f.p_values.values()), f.flags or "-")
        for f in findings
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    command(selftest)
