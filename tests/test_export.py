"""A run's model as a folder: what loads from it classifies as the run's checkpoint does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from cadis_ray.errors import UsageError
from cadis_ray.export import Target, export
from cadis_ray.finetuning.base_classifier import adapted_classifier, load_finetuned
from cadis_ray.finetuning.checkpoint import save_checkpoint
from cadis_ray.finetuning.optimiser import make_optimiser
from cadis_ray.models.classifiers.classifier import load_classifier
from cadis_ray.results.export.hub import write_hub_folder
from cadis_ray.results.export.smoothed import SmoothedClassifier
from cadis_ray.storage.ledger import Ledger
from cadis_ray.study.folder import open_folder
from cadis_ray.study.load import load_study
from cadis_ray.study.study import changed, configuration
from tests.helpers.places import DIGITS

STUDY = load_study(DIGITS)
DRAWN = {"finetuning.lora.r": 8, "finetuning.adv_weight": 2.5}
IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A run with a fine-tuned trial, and that trial's logits."""
    folder = tmp_path_factory.mktemp("run") / "run"
    open_folder(STUDY, DIGITS.read_text(), folder)
    chosen = configuration(STUDY, DRAWN)
    classifier = adapted_classifier(chosen, 0)
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    checkpoint = folder / "training" / "epoch-0001"
    checkpoint.mkdir(parents=True)
    save_checkpoint(checkpoint, classifier, make_optimiser(classifier, chosen.finetuning), chosen, seed=0, epoch=1)
    with Ledger(folder / "ledger.sqlite") as ledger:
        ledger.open_trial(0, "trial-0000", None, DRAWN)
        ledger.close_trial(0, "complete", checkpoint=str(checkpoint))
        ledger.open_trial(1, "trial-0001", None, DRAWN)
        ledger.close_trial(1, "failed", "loss is nan")
    with torch.inference_mode():
        logits = load_finetuned(chosen, checkpoint)(IMAGES)
        assert (logits - load_finetuned(changed(chosen, {"finetuning.recipe": "none"}), None)(IMAGES)).abs().max() > 0.1
    return folder, logits


def test_safetensors(run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, logits = run
    export(folder, Target.SAFETENSORS, tmp_path / "out", "trial-0000")
    with torch.inference_mode():
        assert torch.allclose(SmoothedClassifier.load(tmp_path / "out").classifier(IMAGES), logits, atol=1e-5)
    assert "has not been certified" in (tmp_path / "out" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UsageError, match="exists; give another --out"):
        export(folder, Target.SAFETENSORS, tmp_path / "out", "trial-0000")


def test_the_card_s_code_runs(run: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run[0], Target.SAFETENSORS, tmp_path / "FOLDER", "trial-0000")
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (tmp_path / "FOLDER" / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert 'smoothed = cadis_ray.SmoothedClassifier.load(Path("FOLDER"))' in code
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["images"].shape == (1, 8, 8, 1)
    assert names["found"].estimation.sum() == 10_000
    assert names["classes"].shape == (1,)


def test_the_layout_of_the_hub_loads_in_its_own_library(run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, logits = run
    export(folder, Target.HF, tmp_path / "out", "trial-0000")
    backbone = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    ours = load_classifier("timm", f"local-dir:{tmp_path}/out", None, {}, "own")
    with torch.inference_mode():
        assert torch.allclose(backbone(IMAGES), logits, atol=1e-5)
        assert torch.allclose(ours(IMAGES), logits, atol=1e-5)
    assert SmoothedClassifier.load(tmp_path / "out" / "smoothed").record["sigma"] == STUDY.base.sigma
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlibrary_name: cadis-ray\n")


def test_a_transformers_model_keeps_its_own_mean_and_std(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
             "image_size": 8, "patch_size": 4, "num_labels": 3}  # fmt: skip
    classifier = load_classifier("transformers", "vit", None, small, "half")
    write_hub_folder(tmp_path, classifier, "transformers")
    again = load_classifier("transformers", f"local-dir:{tmp_path}", None, {}, "own")
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(again(images), classifier(images))
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_mean"] == [0.5]


@pytest.mark.parametrize(
    ("model", "said"),
    [(None, "no winner yet; .*one of trial-0000, trial-0001"), ("trial-9", "got 'trial-9'"),
     ("trial-0001", "failed and has no checkpoint")],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused(run: tuple[Path, torch.Tensor], tmp_path: Path, model, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        export(run[0], Target.SAFETENSORS, tmp_path / "out", model)
    assert list(tmp_path.iterdir()) == []


def test_a_library_without_a_layout_on_the_hub_is_refused(tmp_path: Path) -> None:
    classifier = load_classifier("resnet", "resnet20", None, {"num_classes": 10}, "own")
    with pytest.raises(UsageError, match="resnet has no layout on the hub"):
        write_hub_folder(tmp_path, classifier, "resnet")
