"""Sharding work items over Ray Data actors."""

from collections.abc import Iterator
from typing import Any

import ray.data

from cadis_ray.config import Resources


def on_actors(
    items: list[dict[str, Any]], actor: type, arguments: dict[str, Any], resources: Resources
) -> Iterator[dict[str, Any]]:
    """Send every item to one of the Ray Data actors, whose calls yield rows; passes these on as they come, in no order.

    A dead actor's item is sent again: what an actor answers must be a function of the item alone, and may come twice.
    """
    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # a row leaves its actor at once: what has arrived is not lost with it
    arguments = arguments | {
        "device": "cuda" if resources.gpus_per_actor else "cpu",
        "threads": resources.threads_per_process,
    }
    # One item a block: it is what an actor takes at a time, and what is done again if the actor dies.
    rows = ray.data.from_items(items, override_num_blocks=len(items)).flat_map(
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
