"""What fine-tuning and voting ask of a classifier: the one place that knows it of each recipe."""

from typing import NamedTuple

from cadis_ray.finetuning.configuration import Configuration


class Passes(NamedTuple):
    """Passes of images through a classifier; ``learning``: those backward that give its weights a gradient too."""

    forward: float = 0
    backward: float = 0
    learning: float = 0

    @property
    def worth(self) -> float:
        """How many passes forward take as long: a gradient of images takes one more, and of weights another."""
        return sum(self)

    def times(self, count: float) -> "Passes":
        """Repeat them ``count`` times."""
        return Passes(*(count * passes for passes in self))


def passes_an_image(chosen: Configuration) -> Passes:
    """Count what one training image takes in one epoch, at most.

    FT-CADIS passes M denoised images for the loss, M in each of T steps of the attack, which needs no gradient of
    weights, and M adversarial images; fewer where an image's M predictions are not all right: it is not attacked then.
    A frozen selection passes M more, forward. A black box is only asked.
    """
    settings = chosen.finetuning
    steps, frozen, loss = settings.attack_steps, settings.update_selection == "frozen", Passes(1, 1, 1)
    attacked = settings.adv_weight > 0
    adversarial = attacked * (steps + 1)
    each = {
        "none": Passes(),
        "ft_cadis": Passes(1 + frozen + adversarial, 1 + adversarial, 1 + attacked),
        "denoised_ce": loss,
        "gaussian": loss,
        "smoothadv": Passes(steps + 1, steps + 1, 1),
        "peft_smoothing": loss,
        "black_box_prompt": Passes(2 * settings.coordinator.averages),
    }
    return each[settings.recipe].times(settings.num_noises)


def calls_a_vote(chosen: Configuration) -> int:
    """Count the passes forward that one vote takes."""
    return chosen.base_classifier.local_noises if chosen.kind == "local_smoothing" else 1
