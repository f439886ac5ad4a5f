"""The model card of a smoothed classifier: what it is, what its certificates were, what made it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cadis_ray.interface.text import one_line
from cadis_ray.results.report.table import certificates_table, markdown, to_markdown
from cadis_ray.results.study import StudyResult

USE = """```python
from pathlib import Path
import cadis_ray
import numpy as np

smoothed = cadis_ray.SmoothedClassifier.load(Path("FOLDER"))
images = np.zeros({shape}, np.uint8)  # yours: (N, H, W, C), uint8 or floating in [0, 1]
classes = smoothed.predict(images, n=1000, alpha=0.001)  # -1: it abstains
found = smoothed.certify(images, n0=100, n=10_000, alpha=0.001)
found.predict, found.radius, found.p_a_lower, found.selection, found.estimation
```"""
MEANING = """A certificate (class, radius R) says: the smoothed classifier answers this class for every image closer
than R in l2 distance, on pixels in [0, 1]. Each is false with probability at most alpha. It is void for images that
someone chose who knew the noise, for the best of several answers, and for other weights, another sigma or precision."""


def model_card(result: StudyResult, name: str, record: Mapping[str, Any]) -> str:
    """Markdown, with the header that the Hugging Face hub reads. ``record``: the content of smoothed.json."""
    shape = record["image_shape"] or f"{record['channels']} channels, any height and width"
    facts = {
        "study": one_line(result.name),
        "model": one_line(name) + (", the winner of its search" if name == result.winner else ""),
        "sigma": f"{record['sigma']:g}, on pixels in [0, 1]",
        "denoiser's timestep": f"{record['timestep']}, whose noise is {record['sigma_actual']:.6g}",
        "noise": f"{record['noise']}, see models.denoisers.Denoiser.add_noise",
        "precision": record["precision"],
        "images (C, H, W)": str(shape),
        "classes": str(record["classes"]),
        "base classifier": f"{record['classifier']['library']}: {one_line(record['classifier']['name'])}",
        "denoiser": record["denoiser"]["family"],
        "identity of the classifier": f"SHA-256 {record['model']}",
    }
    facts |= {f"SHA-256 of {file}": digest for file, digest in record["sha256"].items()}
    facts |= {f"made with {package}": version for package, version in record["versions"].items()}
    lines = ["| | |", "| :-- | :-- |", *(f"| {markdown(key)} | {markdown(value)} |" for key, value in facts.items())]
    parts = [
        "---\nlibrary_name: cadis-ray\npipeline_tag: image-classification\n"
        "tags: [randomized-smoothing, certified-robustness]\n---",
        f"# {markdown(one_line(f'{result.name}: {name}'))}",
        "A denoised smoothed classifier: the majority vote of a classifier over Gaussian noise that a diffusion model"
        " takes away again.",
        "\n".join(lines),
        "## Certificates",
    ]
    if certificates := result.certificates.get(name):
        table = certificates_table(replace(result, certificates={name: certificates}))
        parts += [f"**{markdown(table.title)}**", to_markdown(table).rstrip()]
    else:
        parts.append("This model has not been certified; the search only estimated it.")
    channels, height, width = record["image_shape"] or (record["channels"], 32, 32)
    use = USE.format(shape=(1, height, width, channels))
    return "\n\n".join([*parts, MEANING, "## Use", use]) + "\n"
