"""A model that is nothing but a function from images to answers, behind a callable or an HTTP endpoint."""

import importlib
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cadis_ray.errors import CadisError, DataError, EnvironmentProblem, UsageError
from cadis_ray.models.adapters.coordinator import Coordinator
from cadis_ray.models.classifiers.classifier import Classifier

FIRST_PAUSE = 0.1  # seconds before the first retry; doubled for each further one
Endpoint = Callable[[np.ndarray], Any]


class Unavailable(Exception):
    """No answer this time; another try may get one."""


class BlackBox:
    """Images (B, C, H, W) float32 in pixels of [0, 1] and, because of the noise, beyond -> answers (B, K) float32.

    ``endpoint``: a callable, ``module:function``, or ``http(s)://...``. A function gets a NumPy array. A server gets a
    POST whose body is that array as .npy, and answers JSON, {"logits": [[...], ...]} or {"labels": [...]}. Either
    answers logits (B, K) or labels (B,), integers in [0, K); a label becomes logits of 1 and 0. Requests have at most
    ``batch_size`` images.

    Tried again up to ``retries`` times, after a pause that doubles: no answer within ``timeout`` seconds, a refused or
    broken connection, HTTP 429 and 5xx; of a function, OSError (TimeoutError is one). Then EnvironmentProblem. Refused
    at once with DataError, because another try would only hide it: another number of rows or classes, labels outside
    [0, K), values that are not finite, any other status or exception. So a vote is what the model answered or there
    is none. ``rate`` limits images a second; ``sent`` counts images, retries too, and EnvironmentProblem comes before
    it would pass ``budget``.
    """

    def __init__(
        self,
        endpoint: str | Endpoint,
        classes: int,
        *,
        timeout: float = 30.0,
        retries: int = 3,
        rate: float | None = None,
        budget: int | None = None,
        batch_size: int = 256,
    ) -> None:
        self.name = endpoint if isinstance(endpoint, str) else getattr(endpoint, "__name__", type(endpoint).__name__)
        self.classes, self.retries, self.rate, self.budget = classes, retries, rate, budget
        self.batch_size, self.sent, self._free_at = batch_size, 0, 0.0
        self._ask = _function(endpoint, timeout) if isinstance(endpoint, str) else endpoint

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Rows that are not finite are not sent: no noise makes them, and their logits are NaN, a vote for no class."""
        logits = torch.full((len(images), self.classes), torch.nan)
        sound = images.isfinite().flatten(1).all(dim=1).cpu()
        pixels = images.detach().float().cpu()[sound].numpy()
        answers = [self._answer(pixels[i : i + self.batch_size]) for i in range(0, len(pixels), self.batch_size)]
        if answers:
            logits[sound] = torch.from_numpy(np.concatenate(answers))
        return logits.to(images.device)

    def _answer(self, pixels: np.ndarray) -> np.ndarray:
        for attempt in range(self.retries + 1):
            self._account(len(pixels))
            try:
                return self._checked(self._ask(pixels), len(pixels))
            except (Unavailable, OSError) as error:
                if attempt == self.retries:
                    raise EnvironmentProblem(f"{self.name}: no answer after {attempt + 1} tries: {error}") from error
                time.sleep(FIRST_PAUSE * 2**attempt)
            except CadisError:
                raise
            except Exception as error:  # whatever a function raises, it has not answered
                raise DataError(f"{self.name}: {type(error).__name__}: {error}") from error
        raise AssertionError("unreachable")

    def _account(self, images: int) -> None:
        if self.budget is not None and self.sent + images > self.budget:
            raise EnvironmentProblem(
                f"{self.name}: {self.sent} of {self.budget} images are sent and {images} more are needed; raise "
                "black_box.budget, or count less"
            )
        self.sent += images
        if self.rate is not None:
            now = time.monotonic()
            time.sleep(max(0.0, self._free_at - now))
            self._free_at = max(now, self._free_at) + images / self.rate

    def _checked(self, answer: Any, rows: int) -> np.ndarray:
        try:
            held = np.asarray(answer.detach().cpu() if isinstance(answer, Tensor) else answer)
        except ValueError as error:
            raise DataError(f"{self.name}: rows of different lengths: {error}") from None
        if held.ndim == 1 and len(held) == rows and np.issubdtype(held.dtype, np.integer):
            if held.min() < 0 or held.max() >= self.classes:
                raise DataError(f"{self.name}: labels from {held.min()} to {held.max()}; need [0, {self.classes})")
            return np.eye(self.classes, dtype=np.float32)[held]
        if held.shape != (rows, self.classes) or not np.issubdtype(held.dtype, np.number):
            raise DataError(
                f"{self.name}: answered {held.dtype} {held.shape} to {rows} images; need logits ({rows}, "
                f"{self.classes}) or integer labels ({rows},)"
            )
        logits = held.astype(np.float32)
        if not np.isfinite(logits).all():
            raise DataError(f"{self.name}: logits that are not finite for {int((~np.isfinite(logits)).any(1).sum())} "
                            f"of {rows} images")  # fmt: skip
        return logits


class BlackBoxModel(nn.Module):
    """A black box as a base classifier: noisy images on the [-1, 1] scale -> logits, a prompt added between."""

    def __init__(self, box: BlackBox, coordinator: Coordinator | None) -> None:
        super().__init__()
        self.box, self.coordinator = box, coordinator

    def forward(self, images: Tensor) -> Tensor:
        return self.box(((images if self.coordinator is None else self.coordinator(images)) + 1) / 2)


def _function(endpoint: str, timeout: float) -> Endpoint:
    if endpoint.startswith(("http://", "https://")):
        return lambda pixels: _post(endpoint, pixels, timeout)
    module, _, name = endpoint.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"black_box.endpoint: got {endpoint!r}; need module:function or http(s)://: {error}") from None


def _post(url: str, pixels: np.ndarray, timeout: float) -> Any:
    body = io.BytesIO()
    np.save(body, pixels, allow_pickle=False)
    request = urllib.request.Request(url, body.getvalue(), {"Content-Type": "application/octet-stream"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 429 or error.code >= 500:
                raise Unavailable(f"HTTP {error.code}") from error
            raise DataError(f"{url}: HTTP {error.code}") from error
    try:
        answer = json.loads(content)
        (kind,) = {"logits", "labels"} & answer.keys()
        return np.asarray(answer[kind], np.float32 if kind == "logits" else None)
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f'{url}: need JSON {{"logits": [[...]]}} or {{"labels": [...]}}: {error}') from error


Trained = Classifier | BlackBoxModel
