"""Memory of a driver that certifies more images than it could hold.

    python benchmarks/streaming.py [--images 20000] [--side 64] [--limit-gib 1.5]

Writes JPEGs of smooth random images as Parquet shards and random weights of a small classifier, and certifies every
image with ``python -m cadis_ray.certify`` in a process of its own, with two actors. A denoiser, which runs in those
alone, would only make that longer: the classifier votes on the noisy images. Prints one JSON line with the peak of that
driver's resident memory, and of the actors and Ray together beside it; exits 1 above the limit or where certificates
are missing.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from cadis_ray.models.checkpoints import write_safetensors
from cadis_ray.models.classifiers.classifier import Classifier, load_classifier

CLASSES, SHARD = 10, 5000
CLASSIFIER = {"img_size": 64, "patch_size": 16, "num_classes": CLASSES, "embed_dim": 32, "depth": 1, "num_heads": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--limit-gib", type=float, default=1.5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study, pixels = write_study(folder, arguments.images, arguments.side)
        command = [sys.executable, "-m", "cadis_ray.certify", str(study), "--out", str(folder / "out")]
        began = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
            own, others = watched(driver)
        lines = [path.read_text().count("\n") - 1 for path in folder.glob("out/certificates/*.tsv")]
    complete = driver.returncode == 0 and lines == [arguments.images]
    print(json.dumps({
        "images": arguments.images, "side": arguments.side, "pixels_gib": gib(pixels), "driver_peak_gib": gib(own),
        "others_peak_gib": gib(others), "seconds": round(time.monotonic() - began), "complete": complete,
    }))  # fmt: skip
    sys.exit(not complete or gib(own) > arguments.limit_gib)


def write_study(folder: Path, images: int, side: int) -> tuple[Path, int]:
    """The study file, and how many bytes its test images have as float32."""
    classifier = load_classifier("timm", "vit_tiny_patch16_224", None, CLASSIFIER | {"img_size": side}, "half")
    rng = np.random.default_rng(0)
    balance(classifier, [jpeg(rng, side) for _ in range(200)])
    counts = {"train": 2000, "test": images}
    for part, count in counts.items():
        shards = -(-count // SHARD)
        for shard in range(shards):
            made = [jpeg(rng, side) for _ in range(min(SHARD, count - shard * SHARD))]
            labels = torch.cat([logits(classifier, made[at : at + 250]) for at in range(0, len(made), 250)])
            table = pa.table({"image": made, "label": labels.argmax(dim=1).numpy()})
            pq.write_table(table, folder / f"{part}-{shard:05}-of-{shards:05}.parquet", row_group_size=500)
    write_safetensors(folder / "classifier.safetensors", classifier.backbone.state_dict())
    study = folder / "study.yaml"
    study.write_text(json.dumps({
        "name": "streaming", "trials": 1, "space": {"finetuning.adv_weight": {"low": 1, "high": 2}},
        "base": {
            "data": {"name": "parquet", "path": ".", "validation": 100, "test": images}, "sigma": 0.5,
            "denoiser": {"family": "improved_diffusion", "checkpoint": "package:digits_denoiser.safetensors"},
            "base_classifier": {"kind": "classify"},
            "classifier": {
                "library": "timm", "name": "vit_tiny_patch16_224", "checkpoint": "classifier.safetensors",
                "config": CLASSIFIER | {"img_size": side},
            },
            "finetuning": {"batch_size": 10},
            "validation": {"images": 100},
            "certification": {"images": images, "n0": 1, "n": 3, "alpha": 0.25, "radii": [0]},
        },
    }))  # fmt: skip
    return study, images * 3 * side * side * 4


@torch.inference_mode()
def logits(classifier: Classifier, images: list[bytes]) -> torch.Tensor:
    """(N, K) for clean images: their largest are the labels, since a classifier that knows none is refused."""
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in images])
    return classifier(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)


def balance(classifier: Classifier, images: list[bytes]) -> None:
    """Move the head so that no class is the answer to all images, as random weights have it."""
    mean = logits(classifier, images).mean(dim=0)
    with torch.no_grad():
        classifier.backbone.get_parameter("head.bias").sub_(mean)


def jpeg(rng: np.random.Generator, side: int) -> bytes:
    coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def watched(driver: subprocess.Popen) -> tuple[int, int]:
    """Peaks of resident bytes until the driver ends: its own, and the sum of its descendants'."""
    process, own, others = psutil.Process(driver.pid), 0, 0
    while driver.poll() is None:
        try:
            own = max(own, process.memory_info().rss)
            others = max(others, sum(resident(child) for child in process.children(recursive=True)))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.25)
    driver.wait()
    return own, others


def resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def gib(size: int) -> float:
    return round(size / 2**30, 2)


if __name__ == "__main__":
    main()
