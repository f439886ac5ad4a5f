"""A study file is read as it stands, or refused with every problem at its line and column."""

import json
import math
import pickle
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import reduce
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import Any

import pytest
import yaml

from cadis_ray.errors import ExitCode, UsageError
from cadis_ray.study.folder import fingerprint
from cadis_ray.study.load import load_study
from cadis_ray.study.sections import Distribution
from cadis_ray.study.study import Study, configuration, max_epochs, max_num_noises, searched_paths
from tests.helpers.places import ROOT

BAD_INPUTS = sorted((ROOT / "tests" / "bad_inputs").glob("*.yaml"))
VALID = """
name: valid
seed: 7
trials: 8
base:
  data: {name: digits, seed: 1, validation: 400, test: 200}
  sigma: 0.25
  denoiser:
    family: improved_diffusion
    checkpoint: d.safetensors
    config: {image_size: 8, in_channels: 1, channel_mult: "1,2", diffusion_steps: 4000, noise_schedule: cosine}
  classifier: {library: timm, name: vit_tiny_patch16_224, checkpoint: c.safetensors, config: {num_classes: 10}}
  finetuning:
    recipe: ft_cadis
    adapter: lora
    lora: {r: 4, lora_alpha: 4, target_modules: [q, v]}
    adv_weight: 1
    attack_radius: 0.05
    attack_steps: 2
    num_noises: 4
    renormalise: false
    select: all
    epochs: 5
    batch_size: 64
    base_lr: 1e-3
    weight_decay: 0.01
    clip: global
    attack_radius_doubles_after: 3
  validation: {images: 300, samples: 64}
  certification: {images: 200, n0: 100, n: 10000, alpha: 0.001, radii: [0, 0.25, 0.5]}
space:
  finetuning.adv_weight: {low: 0.5, high: 8, log: true}
  finetuning.adapter: {choices: [lora, full]}
  finetuning.lora.r: {low: 1, high: 8, integer: true, when: {finetuning.adapter: lora}}
  finetuning.num_noises: {choices: [1, 2]}
baselines:
  off_the_shelf: {finetuning.recipe: none}
  cross_entropy: {finetuning.recipe: denoised_ce, finetuning.epochs: 9}
objective: {maximise: acr}
sampler: {name: tpe, startup: 3}
scheduler: {name: asha, grace_epochs: 1, reduction_factor: 3}
resources: {workers_per_trial: 2, concurrent_trials: 2, gpus_per_worker: 0.5}
tracking: {uri: "sqlite:////tmp/x.db", experiment: valid}
"""


@pytest.fixture(autouse=True)
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two checkpoints beside the study, and a package that ships one denoiser."""
    folder = tmp_path / "embedded"
    folder.mkdir()
    (folder / "shipped.safetensors").touch()
    shipped = {"image_size": 8, "in_channels": 1, "channel_mult": "1,2", "diffusion_steps": 500}
    (folder / "shipped.json").write_text(json.dumps({"config": shipped}))
    monkeypatch.setattr("cadis_ray.storage.references.EMBEDDED", folder)
    for name in ("d", "c"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    return folder


def load(folder: Path, text: str) -> Study:
    (folder / "study.yaml").write_text(text)
    return load_study(folder / "study.yaml")


def refusal(folder: Path, text: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(folder, text)
    assert caught.value.exit_code == ExitCode.USAGE
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_a_valid_study_is_read_as_it_stands(tmp_path: Path) -> None:
    study = load(tmp_path, VALID)
    assert study.base.finetuning.base_lr == 1e-3
    assert study.base.finetuning.adv_weight == 1.0
    assert study.base.finetuning.lora.target_modules == ("q", "v")
    assert study.base.finetuning.mask == "all_correct"
    assert study.base.certification.radii == (0.0, 0.25, 0.5)
    assert study.base.classifier.checkpoint == str(tmp_path / "c.safetensors")
    assert study.space["finetuning.lora.r"] == Distribution(
        low=1, high=8, integer=True, when={"finetuning.adapter": "lora"}
    )
    assert pickle.loads(pickle.dumps(study)) == study
    assert searched_paths(study) == tuple(study.space)


@pytest.mark.parametrize("file", BAD_INPUTS, ids=lambda file: file.stem)
def test_bad_input_gets_exactly_the_expected_messages(file: Path, tmp_path: Path) -> None:
    """The expected lines are the comments at the end of each file."""
    shutil.copy(file, tmp_path)
    with pytest.raises(UsageError) as caught:
        load_study(tmp_path / file.name)
    message = str(caught.value).replace(f"{tmp_path / file.name}:", "").replace(str(tmp_path), "FOLDER")
    assert message.splitlines() == [line[2:] for line in file.read_text().split("# expected\n")[1].splitlines()]


def test_all_problems_of_one_file_come_at_once(tmp_path: Path) -> None:
    text = VALID
    for old, new in {
        "trials: 8": "trials: eight\ntrials: 8",
        "sigma: 0.25": "sigma: 50000",
        "d.safetensors": "nowhere.safetensors",
        "adv_weight: 1": "adv_wieght: 1",
        "base_lr: 1e-3": "base_lr: fast",
        "after: 3": "after: 5",
        "low: 0.5, high: 8": "low: 8, high: 0.5",
        "images: 300": "images: 401",
        "recipe: none": "recipe: nothing",
    }.items():
        assert old in text
        text = text.replace(old, new, 1)
    starts = [line.split(" ")[:2] for line in refusal(tmp_path, text)]
    assert starts == [
        ["study.yaml:4:9:", "trials:"],
        ["study.yaml:5:1:", "'trials'"],
        ["study.yaml:8:10:", "base.sigma:"],
        ["study.yaml:11:17:", "base.denoiser.checkpoint:"],
        ["study.yaml:18:5:", "base.finetuning.adv_wieght:"],
        ["study.yaml:26:14:", "base.finetuning.base_lr:"],
        ["study.yaml:29:34:", "base.finetuning.attack_radius_doubles_after:"],
        ["study.yaml:30:24:", "base.validation.images:"],
        ["study.yaml:33:32:", "space.finetuning.adv_weight.low:"],
        ["study.yaml:38:38:", "baselines.off_the_shelf.finetuning.recipe:"],
    ]


KeyPath = tuple[str, ...]
FREE = {("base", "classifier", "config", "num_classes"), ("baselines", "off_the_shelf"), ("baselines", "cross_entropy")}


def key_paths(node: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield (*path, key)
        yield from key_paths(value, (*path, key))


def section_at(document: Any, path: KeyPath) -> dict[str, Any]:
    for key in path:
        document = document[key]
    return document


def misspellings(key: str, random: Random) -> list[str]:
    """Two of: one letter of the last word replaced, dropped, doubled, two neighbours swapped."""
    i = random.randrange(key.rfind(".") + 1, len(key))
    other = random.choice(string.ascii_lowercase)
    swapped = key[:i] + key[i : i + 2][::-1] + key[i + 2 :]
    wrong = {key[:i] + other + key[i + 1 :], key[:i] + key[i + 1 :], key[:i] + key[i] + key[i:], swapped} - {key, ""}
    return random.sample(sorted(wrong), 2)


def test_a_misspelt_key_is_refused_at_its_place_with_the_right_one_suggested(tmp_path: Path) -> None:
    random, valid = Random(0), yaml.safe_load(VALID)
    suggested = total = 0
    for path in key_paths(valid):
        for wrong in misspellings(path[-1], random) if path not in FREE else ():
            document = deepcopy(valid)
            section = section_at(document, path[:-1])
            if wrong in section:
                continue
            section[wrong] = section.pop(path[-1])
            text = yaml.safe_dump(document, sort_keys=False)
            problems = refusal(tmp_path, text)
            line = next(line for line in problems if f" {'.'.join((*path[:-1], wrong))}: " in line)
            _, row, column, _ = line.split(":", 3)
            assert text.splitlines()[int(row) - 1][int(column) - 1 :].lstrip("'\"").startswith(wrong)
            hint = line.partition("Did you mean ")[2].rstrip("?").split(" or ")[0]
            suggested += hint == path[-1] or hint.endswith("." + path[-1])
            total += 1
    assert total > 150
    assert suggested / total >= 0.95


def test_a_value_of_another_type_is_refused_under_its_key(tmp_path: Path) -> None:
    valid, accepted, total = yaml.safe_load(VALID), set(), 0
    for path in key_paths(valid):
        for other in ("text", [1.5], {"x": 1}, True, -3.25):
            if type(other) is type(section_at(valid, path)):
                continue
            document = deepcopy(valid)
            section_at(document, path[:-1])[path[-1]] = other
            message = ""
            try:
                load(tmp_path, yaml.safe_dump(document, sort_keys=False))
                accepted.add(path)
            except UsageError as error:
                message = str(error)
            assert path in accepted or ".".join(path) in message, (path, other, message)
            total += 1
    assert accepted == {("base", "denoiser", "config", "channel_mult"), ("base", "classifier", "config", "num_classes")}
    assert total > 250


REQUIRED = """name trials base space base.data base.data.name base.sigma base.denoiser base.denoiser.family
base.denoiser.checkpoint base.classifier base.classifier.library base.classifier.name base.classifier.checkpoint
"""


def test_dropping_a_required_key_is_refused_by_name(tmp_path: Path) -> None:
    valid = yaml.safe_load(VALID)
    for dotted in REQUIRED.split():
        *parents, key = dotted.split(".")
        document = deepcopy(valid)
        del section_at(document, tuple(parents))[key]
        problems = refusal(tmp_path, yaml.safe_dump(document, sort_keys=False))
        assert [line for line in problems if f" {dotted}: missing; need " in line]


def test_dropping_any_other_key_leaves_its_default(tmp_path: Path) -> None:
    valid = yaml.safe_load(VALID)
    base = {key: valid["base"][key] for key in ("sigma", "denoiser")}
    base |= {"data": {"name": "digits"}, "classifier": {**valid["base"]["classifier"], "config": {}}}
    minimal = load(tmp_path, yaml.safe_dump({**valid, "base": base}))
    for path in key_paths(valid["base"], ("base",)):
        if ".".join(path) not in REQUIRED.split() and path[:3] != ("base", "denoiser", "config") and path not in FREE:
            document = deepcopy(valid)
            del section_at(document, path[:-1])[path[-1]]
            study = load(tmp_path, yaml.safe_dump(document, sort_keys=False))
            assert reduce(getattr, path, study) == reduce(getattr, path, minimal)


def test_the_n_that_is_asked_for_is_the_smallest_that_suffices(tmp_path: Path) -> None:
    text = VALID.replace("sigma: 0.25", "sigma: 0.5").replace("radii: [0, 0.25, 0.5]", "radii: [0, 2.0]")
    (problem,) = refusal(tmp_path, text.replace("n: 10000", "n: 100"))
    needed = math.floor(math.log(0.001) / math.log(NormalDist().cdf(2.0 / 0.5))) + 1
    assert f"got 100; need n >= {needed} for radius 2.0" in problem
    assert "no radius above 0.7502 (1.5 sigma)" in problem
    load(tmp_path, text.replace("n: 10000", f"n: {needed}"))
    assert refusal(tmp_path, text.replace("n: 10000", f"n: {needed - 1}"))
    (problem,) = refusal(tmp_path, VALID.replace("n: 10000", "n: 9").replace("radii: [0, 0.25, 0.5]", "radii: [0]"))
    assert "need n >= 10 for radius 0" in problem  # 0.001 ** (1 / 10) is the first above 1/2


def test_rules_hold_for_every_combination_the_search_can_draw(tmp_path: Path) -> None:
    searched = "space:\n  finetuning.epochs: {low: 4, high: 9, integer: true}\n"
    load(tmp_path, VALID.replace("space:\n", searched))
    both = searched + "  finetuning.attack_radius_doubles_after: {choices: [2, 3, 4]}\n"
    (problem,) = refusal(tmp_path, VALID.replace("space:\n", both))
    assert "space.finetuning.attack_radius_doubles_after: got 4; need less than epochs = 4" in problem
    below = VALID.replace("space:\n", both.replace(", 4]", "]"))
    load(tmp_path, below)
    # Without its condition the value would be that of the base, 5 epochs.
    conditional = both.replace("integer: true", "integer: true, when: {finetuning.adapter: lora}")
    conditional = conditional.replace("low: 4", "low: 6").replace("[2, 3, 4]", "[2, 5]")
    (problem,) = refusal(tmp_path, VALID.replace("space:\n", conditional))
    assert "got 5; need less than epochs = 5" in problem


def test_a_shipped_denoiser_brings_its_config(tmp_path: Path) -> None:
    text = re.sub(r"    config: \{image.*\n", "", VALID).replace("d.safetensors", "package:shipped.safetensors")
    study = load(tmp_path, text)
    assert study.base.denoiser.checkpoint == "package:shipped.safetensors"
    assert study.base.denoiser.config is not None
    assert study.base.denoiser.config["diffusion_steps"] == 500
    (problem,) = refusal(tmp_path, text.replace("sigma: 0.25", "sigma: 1e3"))
    assert "base.sigma: got 1000.0; need " in problem
    assert "linear schedule of 500 steps" in problem


def test_a_password_is_refused_and_not_repeated(tmp_path: Path) -> None:
    for uri in ("http://me:hunter2@host", "postgresql://host/db?user=me&password=hunter2", "http://:hunter2@host"):
        (problem,) = refusal(tmp_path, VALID.replace("sqlite:////tmp/x.db", uri))
        assert "tracking.uri: holds a password" in problem
        assert "hunter2" not in problem
    load(tmp_path, VALID.replace("sqlite:////tmp/x.db", "http://me@host:5000"))


def test_what_cannot_be_printed_is_escaped(tmp_path: Path) -> None:
    text = VALID.replace("trials: 8", 'trials: "8\\n"').replace("name: tpe", 'name: "tpe\\e[2J"')
    problems = refusal(tmp_path, text + '"\\e[2J\\nx": 1\n')
    assert len(problems) == 3
    assert all(problem.isprintable() for problem in problems)


@pytest.mark.parametrize(
    "value", ["1e400", "9" * 90, "-1e308", "5e-324", "0", "[]", "'1e5'", "~", '"\0"', "/", "package:.."]
)
def test_extreme_values_anywhere_never_crash(tmp_path: Path, value: str) -> None:
    for line in VALID.splitlines():
        for match in re.finditer(r": ([^{}\[\], ]+)", line):
            changed = f"{line[: match.start(1)]}{value}{line[match.end(1) :]}"
            message = "study.yaml:1:1: "
            try:
                load(tmp_path, VALID.replace(line, changed, 1))
            except UsageError as error:
                message = str(error)
            assert all(re.search(r"study.yaml:\d+:\d+: ", problem) for problem in message.splitlines())


def test_configuration_sets_values_by_path_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    study = load(tmp_path, VALID)
    changed = configuration(study, {"finetuning.lora.r": 8, "finetuning.adv_weight": 2.5})
    assert (changed.finetuning.lora.r, changed.finetuning.adv_weight) == (8, 2.5)
    expected = study.base.model_dump()
    expected["finetuning"]["adv_weight"] = 2.5
    expected["finetuning"]["lora"]["r"] = 8
    assert changed.model_dump() == expected
    assert configuration(study, {}) == study.base
    for parameters, message in {
        ("finetuning.lora.r", 0): "finetuning.lora.r: got 0; need a whole number >= 1",
        ("finetuning.lora.r", True): "finetuning.lora.r: got true",
        ("finetuning.lorra.r", 4): "finetuning.lorra.r: no such field. Did you mean finetuning.lora.r?",
        ("finetuning.lora", 4): "finetuning.lora: a section",
    }.items():
        with pytest.raises(UsageError, match=re.escape(message)):
            configuration(study, dict([parameters]))


def test_the_pool_is_as_large_as_the_largest_trial_or_baseline(tmp_path: Path) -> None:
    study = load(tmp_path, VALID)
    assert (max_num_noises(study), max_epochs(study)) == (4, 9)  # baselines keep the base's M = 4
    alone = VALID.replace("  off_the", "  # off_the").replace("  cross_en", "  # cross_en").replace("baselines:", "")
    study = load(tmp_path, alone)
    assert (max_num_noises(study), max_epochs(study)) == (2, 5)
    sometimes = alone.replace("[1, 2]}", "[1, 2], when: {finetuning.adapter: full}}")
    assert max_num_noises(load(tmp_path, sometimes)) == 4
    ranged = alone.replace("{choices: [1, 2]}", "{low: 2, high: 7, integer: true}")
    assert max_num_noises(load(tmp_path, ranged)) == 7


def test_the_fingerprint_changes_with_results_and_with_nothing_else(tmp_path: Path) -> None:
    base = fingerprint(load(tmp_path, VALID))
    document = yaml.safe_load(VALID)
    backwards = {key: document[key] for key in reversed(document)}
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, elsewhere)
    same = [
        fingerprint(load(tmp_path, yaml.safe_dump(backwards, sort_keys=False))),
        fingerprint(load(elsewhere, VALID)),
        fingerprint(load(tmp_path, VALID.replace("workers_per_trial: 2", "workers_per_trial: 4"))),
        fingerprint(load(tmp_path, VALID.replace("x.db", "y.db"))),
    ]
    assert set(same) == {base}
    changes = {"seed: 7": "seed: 8", "trials: 8": "trials: 9", "n: 10000": "n: 9999", "high: 8, log": "high: 9, log",
               "renormalise: false": "renormalise: true", "startup: 3": "startup: 4"}  # fmt: skip
    different = [fingerprint(load(tmp_path, VALID.replace(old, new, 1))) for old, new in changes.items()]
    (tmp_path / "c.safetensors").write_bytes(b"other weights")
    different.append(fingerprint(load(tmp_path, VALID)))
    assert len({base, *different}) == 1 + len(different)


@pytest.mark.process
def test_neither_torch_nor_ray_nor_numpy_is_imported() -> None:
    """``--help`` has a second, and NumPy and SciPy alone take most of it."""
    heavy = ["torch", "ray", "mlflow", "optuna", "timm", "sklearn", "numpy", "scipy"]
    code = f"import sys, cadis_ray.tune, cadis_ray.study.sections; print(sorted(set({heavy}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


CLASSIFIER = "{library: timm, name: vit_tiny_patch16_224, checkpoint: c.safetensors, config: {num_classes: 10}}"


def with_classifier(**fields: Any) -> str:
    assert CLASSIFIER in VALID
    return VALID.replace(CLASSIFIER, json.dumps(fields))


def test_folders_of_classifiers_stand_where_the_study_stands_and_their_content_counts(tmp_path: Path) -> None:
    text = with_classifier(library="transformers", name="local-dir:models/vit")
    (problem,) = refusal(tmp_path, text)
    assert "base.classifier.name: got 'local-dir:models/vit'; need a folder with config.json" in problem
    (tmp_path / "models" / "vit").mkdir(parents=True)
    (tmp_path / "models" / "vit" / "config.json").write_text("{}")
    study = load(tmp_path, text)
    assert study.base.classifier.name == f"local-dir:{tmp_path}/models/vit"
    assert study.base.classifier.checkpoint is None
    before = fingerprint(study)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, elsewhere)
    assert fingerprint(load(elsewhere, text)) == before
    (tmp_path / "models" / "vit" / "model.safetensors").write_bytes(b"weights")
    assert fingerprint(study) != before
    choice = "space:\n  classifier.name: {choices: ['local-dir:models/vit', 'local-dir:models/none']}\n"
    (problem,) = refusal(tmp_path, text.replace("space:\n", choice))
    assert "space.classifier.name: got 'local-dir:" in problem
    assert "models/none'" in problem


def test_a_classifier_needs_weights_from_somewhere(tmp_path: Path) -> None:
    for library, name in (("timm", "vit_tiny_patch16_224"), ("resnet", "resnet110"), ("transformers", "vit")):
        (problem,) = refusal(tmp_path, with_classifier(library=library, name=name))
        assert "base.classifier.checkpoint: missing; need the file of the weights" in problem
        load(tmp_path, with_classifier(library=library, name=name, checkpoint="c.safetensors", prefix="1."))
    load(tmp_path, with_classifier(library="timm", name="vit_tiny_patch16_224", download=True))
    load(tmp_path, with_classifier(library="timm", name="hf-hub:timm/vit_tiny_patch16_224"))
    load(tmp_path, with_classifier(library="transformers", name="aaraki/vit-base"))
    (problem,) = refusal(tmp_path, with_classifier(library="transformers", name="me/vit", checkpoint="none.pt"))
    assert "none.pt', which is not there; need an existing file" in problem


def test_a_pipeline_is_a_folder_without_arguments(tmp_path: Path) -> None:
    text = re.sub(r"    config: \{image.*\n", "", VALID).replace("improved_diffusion", "diffusers")
    (problem,) = refusal(tmp_path, text)
    assert "d.safetensors'; need a pipeline's folder, with unet and scheduler in it" in problem
    for part in ("unet", "scheduler"):
        (tmp_path / "pipeline" / part).mkdir(parents=True)
    study = load(tmp_path, text.replace("d.safetensors", "pipeline"))
    assert study.base.denoiser.config is None
    before = fingerprint(study)
    (tmp_path / "pipeline" / "unet" / "weights").touch()
    assert fingerprint(study) != before
    (problem,) = refusal(
        tmp_path, VALID.replace("improved_diffusion", "diffusers").replace("d.safetensors", "pipeline")
    )
    assert "base.denoiser.config: got arguments; need none" in problem


def test_noise_is_the_schedules_unless_the_study_says_pixel(tmp_path: Path) -> None:
    study = load(tmp_path, VALID)
    pixel = load(tmp_path, VALID.replace("family: improved", "noise: pixel\n    family: improved"))
    assert (study.base.denoiser.noise, pixel.base.denoiser.noise) == ("diffusion", "pixel")
    assert fingerprint(study) != fingerprint(pixel)
    (problem,) = refusal(tmp_path, VALID.replace("family: improved", "noise: pixels\n    family: improved"))
    assert "need one of 'diffusion', 'pixel'. Did you mean pixel?" in problem


def with_data(**fields: Any) -> str:
    given = "data: {name: digits, seed: 1, validation: 400, test: 200}"
    assert given in VALID
    text = VALID.replace(given, f"data: {json.dumps({'validation': 400, 'test': 200} | fields)}")
    rgb = text.replace('in_channels: 1, channel_mult: "1,2"', 'in_channels: 3, channel_mult: "1,2"')
    return text if fields["name"] == "digits" else rgb


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "digits", "path": "/tmp"}, "path: got text '/tmp'; need none"),
        ({"name": "digits", "test_subset": "every"}, "test_subset: got text 'every'; need first"),
        (
            {"name": "digits", "train": 1198},
            "validation: got validation 400 and test 200 and train 1198; need a sum of at",
        ),
        ({"name": "digits", "image_size": 8}, "image_size: got 8; need none"),
        ({"name": "digits", "seed": -1}, "seed: got -1; need a whole number >= 0"),
        ({"name": "cifar10"}, "path: missing; need the folder or URI of cifar10"),
        ({"name": "cifar10", "path": "/no/such"}, "path: got '/no/such', which is not there; need an existing folder"),
        ({"name": "cifar10", "path": "/", "test": 10001}, "test: got 10001; need at most the 10000 test images"),
        ({"name": "cifar10", "path": "/", "validation": 50000}, "validation: got validation 50000; need a sum below"),
        (
            {"name": "cifar10", "path": "/", "test": 201, "test_subset": "per_class"},
            "test: got 201; need a multiple of",
        ),
        ({"name": "image_folder", "path": "/", "augmentation": "imagenet"}, "augmentation: got text 'imagenet'; need"),
        ({"name": "parquet", "path": "/", "image_size": 31}, "channel_mult: 2 levels need sides that are multiples"),
        ({"name": "parquet", "path": "s3://me:secret@host/x"}, "path: holds a password"),
        ({"name": "cifar"}, "name: got text 'cifar'; need one of 'digits', 'cifar10', 'image_folder', 'parquet'."),
        ({"name": "parquet", "path": "/", "test_subset": "all"}, "test_subset: got text 'all'; need one of 'first'"),
    ],
)
def test_data_that_cannot_be_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    problems = refusal(tmp_path, with_data(**fields))
    found = [problem for problem in problems if message in problem]
    assert len(found) == 1, problems
    assert re.search(r"base\.(data|denoiser\.config)\.", found[0])
    assert "secret" not in found[0]


def test_data_that_can_be_are_read(tmp_path: Path) -> None:
    for fields in (
        {"name": "digits", "train": 1197},
        {"name": "cifar10", "path": str(tmp_path), "test": 10_000, "augmentation": "cifar10"},
        {"name": "image_folder", "path": str(tmp_path), "image_size": 224, "augmentation": "imagenet"},
        {"name": "parquet", "path": "s3://bucket/imagenet", "test": 50_000, "test_subset": "every"},
    ):
        study = load(tmp_path, with_data(**fields))
        assert study.base.data.model_dump().items() >= fields.items()
    (problem,) = refusal(
        tmp_path, with_data(name="parquet", path="s3://b/x", image_size=224).replace("els: 3", "els: 1")
    )
    assert "in_channels: got 1 channels; need in_channels: 3, as parquet has" in problem


def test_cma_es_is_refused_for_two_metrics(tmp_path: Path) -> None:
    text = VALID.replace("name: tpe", "name: cma_es").replace("{maximise: acr}", "{maximise: [acr, clean]}")
    assert any("got cma_es, which knows one metric; need nsga2" in line for line in refusal(tmp_path, text))


@pytest.mark.parametrize(
    ("given", "replaced", "said"),
    [
        ("objective: {maximise: acr}", "objective: {maximise: {certified_accuracy: 0.3}}", "got radius 0.3; need one"),
        ("objective: {maximise: acr}", "objective: {maximise: [clean, clean]}", "got one metric twice"),
        ("{maximise: acr}", "{maximise: [acr]}", "objective.maximise: got a list; need acr, clean, {certified"),
        ("{maximise: acr}", "{maximise: {x: 1}}", "objective.maximise: got a section; need acr, clean, {certified_acc"),
        ("objective: {maximise: acr}", "objective: {maximise: clean}", "scheduler.name: got 'asha'; need 'none'"),
        ("{maximise: acr}", "{maximise: acr, clean_at_least: {baseline: x}}", "need the name of a baseline: off_the"),
        ("name: tpe", "name: gp", "space.finetuning.lora.r.when: sampler gp models no conditional parameter"),
        ("name: tpe", "name: nsga2", "space.finetuning.lora.r.when: sampler nsga2 models no conditional"),
        ("name: tpe", "name: cma_es", "space.finetuning.lora.r.when: sampler cma_es models no conditional"),
        ("name: tpe", "name: cma_es, population: 3", "sampler.population: got 3; need 4 or more"),
        ("name: tpe", "name: grid", "space.finetuning.adv_weight: got a range; need choices"),
        ("seed: 7", "seed: 7\nwarm_start: [there]", "warm_start[0]: got text 'there'; need the absolute path"),
    ],
)
def test_a_search_that_cannot_be_is_refused(tmp_path: Path, given: str, replaced: str, said: str) -> None:
    assert given in VALID
    assert any(said in line for line in refusal(tmp_path, VALID.replace(given, replaced, 1)))
