"""Certificates as the field's tools have them."""

from pathlib import Path

from cadis_ray.certification.certificates import Certificates
from cadis_ray.storage.files import write_whole
from cadis_ray.storage.run_folder import RunFolder


def certificates_tsv(certificates: Certificates) -> str:
    """The columns ``idx label predict radius correct time`` of Cohen et al.'s certify.py, one line an image.

    ``radius`` is the shortest decimal that reads back as the same float64: three digits, as the official
    programs print, round across the radii that tables report. ``time`` is h:mm:ss.ffffff.
    """
    c = certificates
    columns = (c.idx, c.label, c.predict, c.radius, c.correct, c.seconds)
    lines = ["idx\tlabel\tpredict\tradius\tcorrect\ttime"]
    for idx, label, predict, radius, correct, seconds in zip(*columns, strict=True):
        cells = (int(idx), int(label), int(predict), repr(float(radius)), int(correct), clock(float(seconds)))
        lines.append("\t".join(map(str, cells)))
    return "\n".join(lines) + "\n"


def write_certificates(run_dir: Path, certificates: dict[str, Certificates], winner: str | None) -> None:
    """Write every model's certificates, and the winner's also as ``certificates.tsv``."""
    for name, rows in certificates.items():
        write_whole(RunFolder(run_dir).certificates(name), certificates_tsv(rows))
        if name == winner:
            write_whole(RunFolder(run_dir).winner, certificates_tsv(rows))


def clock(seconds: float) -> str:
    """Seconds >= 0 as h:mm:ss.ffffff."""
    whole, micro = divmod(round(seconds * 1e6), 10**6)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}.{micro:06}"
