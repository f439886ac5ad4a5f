"""Sharding work items over Ray Data actors."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import ray.data

from cadis_ray.errors import CadisError
from cadis_ray.models.memory import keep_freed_memory
from cadis_ray.study.sections import Resources


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
        _Late,
        fn_constructor_kwargs={"actor": actor, "arguments": arguments},
        compute=ray.data.ActorPoolStrategy(
            min_size=resources.min_actors,
            max_size=resources.actors,
            initial_size=resources.actors,
            max_tasks_in_flight_per_actor=2,
        ),
        num_cpus=resources.cpus_per_actor,
        num_gpus=resources.gpus_per_actor,
    )
    try:
        yield from rows.iter_rows()
    except Exception as error:
        if (own := _own(error)) is None:
            raise
        raise own from None


class _Late:
    """An actor that is made when its first item comes: what that raises reaches the driver as what it is."""

    def __init__(self, actor: type, arguments: dict[str, Any]) -> None:
        keep_freed_memory()
        self._make, self._actor = partial(actor, **arguments), None

    def __call__(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._actor = self._actor or self._make()
        yield from self._actor(item)


def _own(error: BaseException | None) -> CadisError | None:
    """What an actor raised for the user to read, within what Ray made of it."""
    while (inner := getattr(error, "cause", None) or (error.__cause__ if error else None)) is not None:
        error = inner
    return error if isinstance(error, CadisError) else None
