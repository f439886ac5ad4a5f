"""What a trial asks of its models, counted where it asks."""

import numpy as np
from torch import Tensor, nn

from cadis_ray.finetuning.base_classifier import view_of
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.finetuning.settings import NOISY
from cadis_ray.models.black_box import BlackBoxModel


class Cost:
    """Counts from its making on what ``classifier`` answers, alone or inside another module."""

    def __init__(self, configuration: Configuration, classifier: nn.Module) -> None:
        self._configuration, self._classifier = configuration, classifier
        self._calls, self._sent = 0, 0
        classifier.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, arguments: tuple[Tensor]) -> None:
        self._calls += len(arguments[0])

    def since_last(self) -> dict[str, float]:
        """``classifier_calls``: images that the classifier answered for, forward; ``queries``: images that a black box
        was sent, retries too. Since the last time, in this process."""
        spent: dict[str, float] = {"classifier_calls": self._calls}
        self._calls = 0
        if isinstance(self._classifier, BlackBoxModel):
            spent["queries"], self._sent = self._classifier.box.sent - self._sent, self._classifier.box.sent
        return spent

    def denoised(self, trained: float, votes: np.ndarray) -> float:
        """Denoised images that training on ``trained`` images and ``votes`` (N, K + 1) used, of the pool or not."""
        settings = self._configuration.finetuning
        training = 0 if settings.recipe in NOISY else trained * settings.num_noises
        return training + (int(votes.sum()) if view_of(self._configuration) == "denoised" else 0)
