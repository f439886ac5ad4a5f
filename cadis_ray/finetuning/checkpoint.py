"""A fine-tuned classifier on disk: safetensors and a JSON of everything needed to run them. No pickle."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cadis_ray.errors import DataError, UsageError
from cadis_ray.finetuning.epoch import BEGINNING, Standing
from cadis_ray.models.adapters import add_prompts, add_series
from cadis_ray.models.black_box import BlackBox, BlackBoxModel
from cadis_ray.models.checkpoints import read_state, sha256_of, write_safetensors
from cadis_ray.models.classifiers import Classifier, load_classifier
from cadis_ray.models.coordinator import Coordinator
from cadis_ray.models.lora import add_lora, load_trainable_state, merge_lora, trainable_state
from cadis_ray.models.sharding import like, sharded, whole
from cadis_ray.rules import image_shape
from cadis_ray.storage.identity import identity
from cadis_ray.trial_sections import Configuration

WEIGHTS, OPTIMISER, RECORD = "classifier.safetensors", "optimiser.safetensors", "checkpoint.json"


Trained = Classifier | BlackBoxModel


def adapted_classifier(configuration: Configuration, seed: int) -> Trained:
    """The off-the-shelf classifier, ready for what ``finetuning`` trains: nothing, adapters, or all of it.

    Of the kind black_box: what asks it, with a coordinator to train where the recipe is black_box_prompt.
    """
    if configuration.kind == "black_box":
        return _black_box(configuration, seed)
    settings, model = configuration.finetuning, configuration.classifier
    constructor = model.config | ({"drop_path_rate": settings.drop_path} if settings.drop_path else {})
    classifier = load_classifier(
        model.library, model.name, model.checkpoint, constructor, model.normalise,
        download=model.download, prefix=model.prefix,
    )  # fmt: skip
    if settings.recipe == "none":
        return classifier.requires_grad_(False)
    if settings.adapter == "full":
        return classifier
    if settings.adapter == "prompt":
        return add_prompts(classifier, tokens=settings.prompt.tokens, seed=seed)
    if settings.adapter == "series":
        return add_series(classifier, bottleneck=settings.series.bottleneck, seed=seed)
    lora = settings.lora
    return add_lora(classifier, r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules, seed=seed)


def _black_box(configuration: Configuration, seed: int) -> BlackBoxModel:
    asked, settings, model = configuration.black_box, configuration.finetuning, configuration.classifier
    if asked.endpoint is None or asked.classes is None:
        raise UsageError("black_box: endpoint and classes are missing; the kind black_box needs both")
    if settings.recipe not in ("none", "black_box_prompt"):
        raise UsageError(
            f"base_classifier.kind: black_box cannot be trained by the recipe {settings.recipe}; need none or "
            "black_box_prompt"
        )
    box = BlackBox(
        asked.endpoint, asked.classes, timeout=asked.timeout, retries=asked.retries, rate=asked.rate,
        budget=asked.budget, batch_size=asked.batch_size,
    )  # fmt: skip
    if settings.recipe == "none":
        return BlackBoxModel(box, None)
    encoder = load_classifier(
        model.library, model.name, model.checkpoint, model.config, model.normalise,
        download=model.download, prefix=model.prefix,
    )  # fmt: skip
    shape = image_shape(configuration.data.name, configuration.data.image_size)
    made = settings.coordinator
    coordinator = Coordinator(
        encoder, channels=shape[0] if shape else 3, trigger=made.trigger, hidden=made.hidden, strength=made.strength,
        seed=seed,
    )  # fmt: skip
    return BlackBoxModel(box, coordinator)


def save_checkpoint(
    folder: Path | None,
    classifier: Trained,
    optimiser: torch.optim.Optimizer,
    configuration: Configuration,
    *,
    seed: int,
    epoch: int,
    standing: Standing = BEGINNING,
) -> None:
    """Write what training changed, the optimiser's state and, last, the record into an existing folder.

    ``epoch``: how many are done; ``standing``: how far the next one has come. Where weights are sharded, all workers
    call this together, but for one with None: they give their shards and write nothing.
    """
    with sharded(classifier):
        weights, state = trainable_state(classifier), _flat(optimiser)
    if folder is None:
        return
    write_safetensors(folder / WEIGHTS, weights)
    write_safetensors(folder / OPTIMISER, state)
    record = {
        "epoch": epoch,
        "standing": standing._asdict(),
        "seed": seed,
        "configuration": configuration.model_dump(mode="json"),
        "sha256": {path.name: sha256_of(path) for path in sorted(folder.glob("*.safetensors"))},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def restore_checkpoint(folder: Path, classifier: Trained, optimiser: torch.optim.Optimizer) -> tuple[int, Standing]:
    """Put weights and optimiser state back; returns the epochs done, and how far the next one has come.

    Raises DataError for a damaged folder.
    """
    record = read_record(folder)
    with sharded(classifier):
        load_trainable_state(classifier, read_state(folder / WEIGHTS))
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state = optimiser.state_dict()
    state["state"] = {}
    for key, value in load_file(folder / OPTIMISER).items():
        index, name = key.split(".")
        moment = value if name == "step" else like(value, parameters[int(index)])
        state["state"].setdefault(int(index), {})[name] = moment
    optimiser.load_state_dict(state)
    standing = record["standing"]
    return int(record["epoch"]), Standing(standing["steps"], standing["images"], tuple(standing["sums"]))


def load_finetuned(configuration: Configuration, folder: Path | None) -> Trained:
    """The classifier to certify, in evaluation mode, LoRA merged. ``folder`` None: the off-the-shelf one."""
    classifier = adapted_classifier(configuration, seed=0)  # of weights that are replaced
    if folder is not None:
        read_record(folder)
        load_trainable_state(classifier, read_state(folder / WEIGHTS))
    whole = merge_lora(classifier) if isinstance(classifier, Classifier) else classifier
    return whole.eval().requires_grad_(False)


def model_identity(configuration: Configuration, folder: Path | None) -> str:
    """SHA-256 of all that makes ``load_finetuned``'s classifier what it is: constructor, base and trained weights."""
    content: dict[str, Any] = {"classifier": configuration.classifier.model_dump(mode="json")}
    trained = {"adapter", "lora", configuration.finetuning.adapter}
    if configuration.kind == "black_box":
        behind = configuration.black_box.model_dump(mode="json", include={"endpoint", "classes", "version"})
        content, trained = (content if folder is not None else {}) | {"black_box": behind}, {"coordinator"}
    if folder is not None:
        adapter = configuration.finetuning.model_dump(mode="json", include=trained)
        content |= {"finetuning": adapter, "weights": read_record(folder)["sha256"][WEIGHTS]}
    return identity(content)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint whose files are whole. Raises DataError naming the file that is not."""
    try:
        record = json.loads((folder / RECORD).read_text())
        hashes = record["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: not a checkpoint of this program ({error})") from error
    for name, expected in hashes.items():
        if not (folder / name).exists() or sha256_of(folder / name) != expected:
            raise DataError(f"{folder / name}: missing or damaged: its SHA-256 is not the one in {RECORD}")
    return record


def _flat(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": whole(torch.as_tensor(value))
        for index, values in optimiser.state_dict()["state"].items()
        for name, value in values.items()
    }
