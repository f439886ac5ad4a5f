"""Sharding work items over Ray Data actors."""

from collections.abc import Iterator
from typing import Any

import ray.data

from cadis_ray.config import Resources


def on_actors(
    items: list[dict[str, Any]], actor: type, arguments: dict[str, Any], resources: Resources
) -> Iterator[dict[str, Any]]:
    """Send every item to one of the study's Ray Data actors; yields their rows as they come, in no order.

    A dead actor's item is sent again: an actor's answer must be a function of the item alone.
    """
    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    arguments = arguments | {
        "device": "cuda" if resources.gpus_per_actor else "cpu",
        "threads": resources.threads_per_process,
    }
    # One item a block: an item is the unit that is lost with an actor, and the unit of progress.
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(
        actor,
        fn_constructor_kwargs=arguments,
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=resources.actors,
            initial_size=resources.actors,
            max_tasks_in_flight_per_actor=2,
        ),
        num_cpus=resources.cpus_per_actor,
        num_gpus=resources.gpus_per_actor,
    )
    yield from rows.iter_rows()
