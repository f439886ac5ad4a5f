"""``python -m cadis_ray.pretrain digits``: make the classifier and the denoiser that ship with the package again."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cadis_ray.commands import command
from cadis_ray.errors import UsageError

CLASSIFIER: dict[str, Any] = {
    "img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 64, "depth": 3, "num_heads": 4,
}  # fmt: skip
DENOISER: dict[str, Any] = {
    "image_size": 8, "in_channels": 1, "num_channels": 32, "channel_mult": "1,1", "num_res_blocks": 1,
    "attention_resolutions": "4", "num_heads": 2, "learn_sigma": False, "noise_schedule": "cosine",
    "diffusion_steps": 4000,
}  # fmt: skip


def pretrain(
    data: Annotated[str, typer.Argument(help="The data set: digits.")],
    out: Annotated[Path, typer.Option(help="A folder that does not exist yet.")] = Path("pretrained"),
    seed: int = 0,
    epochs: Annotated[int, typer.Option(help="Of the classifier.")] = 150,
    steps: Annotated[int, typer.Option(help="Of the denoiser.")] = 8_000,
) -> None:
    """Train an off-the-shelf classifier and a diffusion denoiser on a data set's training images."""
    if data != "digits":
        raise UsageError(f"data set: got {data!r}; allowed: digits")
    if out.exists():
        raise UsageError(f"--out {out}: exists already; give a folder that does not")
    import torch

    from cadis_ray import config
    from cadis_ray.data import load
    from cadis_ray.models.checkpoints import write_safetensors
    from cadis_ray.models.classifiers import load_classifier
    from cadis_ray.models.denoisers import make_denoiser
    from cadis_ray.models.pretraining import pretrain_classifier, pretrain_denoiser

    torch.manual_seed(seed)
    images = load(config.Data(name="digits"))
    classifier = load_classifier("timm", "vit_tiny_patch16_224", None, CLASSIFIER, "half")
    train = images.train
    for epoch, loss in enumerate(
        pretrain_classifier(classifier, train.images, train.labels, epochs=epochs, seed=seed), 1
    ):
        if epoch % 10 == 0:
            print(f"classifier: epoch {epoch} of {epochs}, loss {loss:.4f}", flush=True)
    with torch.inference_mode():
        hits = classifier(2 * images.test.images - 1).argmax(1) == images.test.labels
    accuracy = hits.double().mean().item()
    print(f"classifier: clean test accuracy {accuracy:.2%} on {len(hits)} images")
    denoiser = make_denoiser("improved_diffusion", DENOISER)
    for step, loss in pretrain_denoiser(denoiser, train.images, steps=steps, seed=seed):
        print(f"denoiser: step {step} of {steps}, loss {loss:.4f}", flush=True)
    out.mkdir(parents=True)
    write_safetensors(out / "digits_classifier.safetensors", classifier.backbone.state_dict())
    write_safetensors(out / "digits_denoiser.safetensors", denoiser.network.state_dict())
    made = {"data": data, "train_images": len(train.ids), "seed": seed}
    sidecars = {
        "digits_classifier": {"config": CLASSIFIER, "epochs": epochs, "clean_test_accuracy": accuracy},
        "digits_denoiser": {"config": DENOISER, "steps": steps},
    }
    for name, record in sidecars.items():
        (out / f"{name}.json").write_text(json.dumps(made | record, indent=2) + "\n")
    print(f"written to {out}/")


if __name__ == "__main__":
    command(pretrain)
