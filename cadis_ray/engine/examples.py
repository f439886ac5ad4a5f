"""Examples of what the winner is shown, made where the actors of the certification run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cadis_ray.certification import Request
from cadis_ray.engine.actors import on_actors
from cadis_ray.examples import make_examples
from cadis_ray.report.files import read_examples, write_examples
from cadis_ray.results import Examples
from cadis_ray.search_sections import Resources


class Look:
    """One actor: ``make_examples`` of the model that an item names."""

    def __init__(self, request: Request, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.request, self.device = request, device

    def __call__(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        examples = make_examples(self.request, item["model"], self.device)
        if examples is not None:
            yield vars(examples)


def examples_of(request: Request, name: str, run_dir: Path, resources: Resources) -> Examples | None:
    """Those of a model, from the run's folder if they are there already."""
    held = read_examples(run_dir)
    if held is None or held.name != name:
        one = resources.model_copy(update={"actors": 1, "min_actors": 1})
        rows = list(on_actors([{"model": name}], Look, {"request": request}, one))
        held = Examples(**rows[0]) if rows else None
        if held:
            write_examples(run_dir, held)
    return held
