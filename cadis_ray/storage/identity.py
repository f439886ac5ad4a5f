"""What names a run, a model and a vote: hashes of settings, with the content of files instead of their paths."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from cadis_ray.errors import UsageError
from cadis_ray.storage.files import digest
from cadis_ray.storage.references import LOCAL, checkpoint_file

# Keys whose values are files or folders, of a section or as a dotted path; of the names only those so marked.
PLACES = {"checkpoint": "", "classifier.checkpoint": "", "name": LOCAL, "classifier.name": LOCAL}


# The keys that each section had when its whole content was hashed, defaults too: until version 0.1.0.
_WHOLE = {
    "": "seed trials base space baselines objective sampler warm_start scheduler finalists concurrent_trials",
    "base": "data sigma denoiser classifier base_classifier black_box finetuning validation certification",
    "base.data": "name path seed train validation test test_subset augmentation image_size",
    "base.denoiser": "family checkpoint config noise",
    "base.classifier": "library name checkpoint config normalise prefix download",
    "base.base_classifier": "kind local_noises local_sigma local_seed",
    "base.black_box": "endpoint classes version timeout retries rate budget batch_size",
    "base.finetuning": "recipe adapter lora prompt series coordinator adv_weight attack_radius attack_steps num_noises"
    " renormalise warm_start detach_target select confidence update_selection mask target reduction epochs stop_after"
    " batch_size accumulation base_lr min_lr warmup_epochs weight_decay weight_decay_end layer_decay clip clip_norm"
    " drop_path precision attack_radius_doubles_after attack_warmup_epochs noise_sigma",
    "base.finetuning.lora": "r lora_alpha target_modules",
    "base.finetuning.prompt": "tokens",
    "base.finetuning.series": "bottleneck",
    "base.finetuning.coordinator": "trigger hidden strength a c momentum averages",
    "base.validation": "images samples",
    "base.certification": "mode precision images n0 n alpha radii",
    "space.*": "low high log integer choices when",
    "objective": "maximise clean_at_least",
    "objective.clean_at_least": "baseline minus",
    "sampler": "name startup population",
    "scheduler": "name grace_epochs reduction_factor",
    "finalists": "count images samples",
}


def former(content: dict[str, Any], where: str = "") -> dict[str, Any]:
    """A whole section as runs knew it whose names are hashes of whole sections: without keys that came later.

    ``content``: its dump with defaults; ``where``: its dotted path in a study. Such runs are read by these names for
    ever.
    """
    keys = _WHOLE.get(where)
    return {
        key: former(value, _below(where, key)) if isinstance(value, dict) else value
        for key, value in content.items()
        if keys is None or key in keys.split()
    }


def _below(where: str, key: str) -> str:
    path = f"{where}.{key}" if where else key
    return "space.*" if where == "space" else path


def identity(content: dict[str, Any]) -> str:
    """SHA-256 of plain data that came from a study, with the content of its checkpoints instead of their paths.

    Raises UsageError if a checkpoint cannot be read.
    """
    canonical = json.dumps(with_checkpoints(content, _digest), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def with_checkpoints(raw: Any, change: Callable[[str], str], key: str = "") -> Any:
    """A copy with ``change`` applied to each checkpoint or folder: of the base, a baseline, a choice or a condition."""
    if isinstance(raw, dict):
        return {name: with_checkpoints(value, change, key if name == "choices" else name)
                for name, value in raw.items()}  # fmt: skip
    if isinstance(raw, list):
        return [with_checkpoints(item, change, key) for item in raw]
    return change(raw) if isinstance(raw, str) and key in PLACES and raw.startswith(PLACES[key]) else raw


def _digest(checkpoint: str) -> str:
    try:
        return digest(checkpoint_file(checkpoint))
    except OSError as error:
        raise UsageError(f"{checkpoint}: cannot be read: {error.strerror}") from None
