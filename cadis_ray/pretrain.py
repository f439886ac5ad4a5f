"""``python -m cadis_ray.pretrain``: make a classifier and a denoiser for a data set that has none.

Those of digits ship with the package; those of cifar10 are small enough for two CPU cores and 20 minutes.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from cadis_ray.data.settings import Data
from cadis_ray.errors import UsageError
from cadis_ray.interface.command import command

if TYPE_CHECKING:
    from torch import nn

    from cadis_ray.data import Split


class Recipe(NamedTuple):
    """Constructors and lengths of training. ``max_sigma``: the denoiser learns the noise up to there, None: all."""

    library: str
    name: str
    classifier: dict[str, Any]
    denoiser: dict[str, Any]
    epochs: int
    rate: float
    steps: int
    max_sigma: float | None


RECIPES = {
    "digits": Recipe(
        "timm",
        "vit_tiny_patch16_224",
        {
            "img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 64, "depth": 3,
            "num_heads": 4,
        },
        {
            "image_size": 8, "in_channels": 1, "num_channels": 32, "channel_mult": "1,1", "num_res_blocks": 1,
            "attention_resolutions": "4", "num_heads": 2, "learn_sigma": False, "noise_schedule": "cosine",
            "diffusion_steps": 4000,
        },
        epochs=150, rate=4e-3, steps=8_000, max_sigma=None,
    ),
    "cifar10": Recipe(
        "resnet",
        "resnet20",
        {"num_classes": 10},
        {
            "image_size": 32, "in_channels": 3, "num_channels": 32, "channel_mult": "1,1,1", "num_res_blocks": 1,
            "attention_resolutions": "8", "num_heads": 2, "learn_sigma": False, "noise_schedule": "cosine",
            "diffusion_steps": 4000,
        },
        epochs=3, rate=1e-2, steps=700, max_sigma=1.0,
    ),
}  # fmt: skip


def pretrain(
    name: Annotated[str, typer.Argument(help=f"The data set: {' or '.join(RECIPES)}.")],
    data: Annotated[Path | None, typer.Option(help="The data set's folder; digits has none.")] = None,
    out: Annotated[Path, typer.Option(help="A folder that does not exist yet.")] = Path("pretrained"),
    seed: int = 0,
    epochs: Annotated[int | None, typer.Option(help="Of the classifier. Default: the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of the denoiser. Default: the recipe's.")] = None,
) -> None:
    """Train an off-the-shelf classifier and a diffusion denoiser on a data set's training images."""
    if name not in RECIPES:
        raise UsageError(f"data set: got {name!r}; allowed: {', '.join(RECIPES)}")
    if (name == "digits") != (data is None):
        raise UsageError("--data: cifar10 needs the folder of its files, digits has none")
    if out.exists():
        raise UsageError(f"--out {out}: exists already; give a folder that does not")
    import torch

    from cadis_ray.data import load
    from cadis_ray.models.classifiers.classifier import load_classifier
    from cadis_ray.models.denoisers.diffusion import make_denoiser
    from cadis_ray.models.memory import keep_freed_memory
    from cadis_ray.models.pretraining import pretrain_classifier, pretrain_denoiser, shifted

    keep_freed_memory()
    recipe = RECIPES[name]
    epochs, steps = epochs or recipe.epochs, steps or recipe.steps
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images = load(Data(name=name, path=None if data is None else str(data), test=400))  # pyright: ignore[reportArgumentType]
    train = images.train

    def augmented(rows: torch.Tensor, epoch: int) -> torch.Tensor:
        return train.augmented(rows, epoch, seed, "cifar10")

    classifier = load_classifier(recipe.library, recipe.name, None, recipe.classifier, "half")  # pyright: ignore[reportArgumentType]
    read = shifted(train.images, generator) if name == "digits" else augmented
    for epoch, loss in enumerate(
        pretrain_classifier(classifier, train.labels, read, epochs=epochs, rate=recipe.rate, generator=generator), 1
    ):
        if epoch % 10 == 0 or epochs < 10:
            print(f"classifier: epoch {epoch} of {epochs}, loss {loss:.4f}", flush=True)
    accuracy = _accuracy(classifier, images.test)
    print(f"classifier: clean test accuracy {accuracy:.2%} on {len(images.test.labels)} images", flush=True)
    denoiser = make_denoiser("improved_diffusion", recipe.denoiser)
    timesteps = None if recipe.max_sigma is None else denoiser.timestep(recipe.max_sigma) + 1
    pixels = train.images if name == "digits" else None

    def read_plain(rows: torch.Tensor, step: int) -> torch.Tensor:
        return augmented(rows, step) if pixels is None else pixels[rows]

    for step, loss in pretrain_denoiser(
        denoiser, read_plain, len(train.ids), steps=steps, seed=seed, timesteps=timesteps, report_every=steps // 16 or 1
    ):
        print(f"denoiser: step {step} of {steps}, loss {loss:.4f}", flush=True)
    out.mkdir(parents=True)
    made = {"data": name, "train_images": len(train.ids), "seed": seed}
    own = {"config": recipe.classifier, "epochs": epochs, "clean_test_accuracy": accuracy}
    _write(out / f"{name}_classifier", classifier.backbone, made | own)
    _write(out / f"{name}_denoiser", denoiser.network, made | {"config": recipe.denoiser, "steps": steps})
    print(f"written to {out}/")


def _accuracy(classifier: "nn.Module", test: "Split") -> float:
    import torch

    with torch.inference_mode():
        hits = classifier(2 * test.images - 1).argmax(1) == test.labels
    return hits.double().mean().item()


def _write(path: Path, network: "nn.Module", record: dict[str, Any]) -> None:
    """Write the weights and, beside them, how they were made; ``path`` is without its suffix."""
    from cadis_ray.models.checkpoints import write_safetensors

    write_safetensors(path.with_suffix(".safetensors"), network.state_dict())
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    command(pretrain)
