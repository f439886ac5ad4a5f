"""A black box against a local server and hostile functions: retried or refused, never a vote of our own making."""

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from cadis_ray.errors import DataError, EnvironmentProblem, UsageError
from cadis_ray.models import black_box
from cadis_ray.models.black_box import BlackBox
from cadis_ray.smoothing.noise import Stream
from cadis_ray.smoothing.sampling import sample_votes

IMAGES = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
WEIGHTS = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)


def right(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(len(pixels), -1) @ WEIGHTS


class Server(ThreadingHTTPServer):
    """Answers with what ``replies`` says, in turn; then, or for None, as ``right`` does."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Callable[[np.ndarray], Any] | int | None] = []
        self.asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.asked += 1
        reply = server.replies.pop(0) if server.replies else None
        pixels = np.load(io.BytesIO(self.rfile.read(int(self.headers["Content-Length"]))), allow_pickle=False)
        if isinstance(reply, int):
            self.send_error(reply)
            return
        answer = {"logits": right(pixels).tolist()} if reply is None else reply(pixels)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        try:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # who asked has given up

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(black_box, "FIRST_PAUSE", 0.001)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def late(pixels: np.ndarray) -> Any:
    time.sleep(0.3)
    return {"logits": (-right(pixels)).tolist()}


def test_logits_and_labels_are_those_of_the_model(server: Server) -> None:
    box = BlackBox(server.url, 3, batch_size=4)
    expected = right(IMAGES.numpy())
    assert np.allclose(box(IMAGES).numpy(), expected, atol=1e-5)
    assert (server.asked, box.sent) == (2, 6)
    server.replies = [lambda pixels: {"labels": right(pixels).argmax(1).tolist()}] * 2
    assert torch.equal(box(IMAGES), torch.eye(3)[expected.argmax(1)])


@pytest.mark.parametrize("failure", [late, 500, 503, 429])
def test_no_answer_is_asked_for_again_and_what_then_comes_counts(server: Server, failure: Any) -> None:
    server.replies = [failure, failure]
    box = BlackBox(server.url, 3, timeout=0.1, retries=2)
    assert np.allclose(box(IMAGES).numpy(), right(IMAGES.numpy()), atol=1e-5)
    assert (server.asked, box.sent) == (3, 18)
    server.replies = [failure] * 2
    with pytest.raises(EnvironmentProblem, match="no answer after 2 tries"):
        BlackBox(server.url, 3, timeout=0.1, retries=1)(IMAGES)


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (lambda p: {"logits": np.zeros((len(p), 4)).tolist()}, "answered float32 \\(6, 4\\) to 6 images"),
        (lambda p: {"logits": right(p)[:-1].tolist()}, "answered float32 \\(5, 3\\) to 6 images"),
        (lambda p: {"logits": [[np.nan, 0, 0], *right(p)[1:].tolist()]}, "not finite for 1 of 6"),
        (lambda p: {"logits": [[np.inf, 0, 0], *right(p)[1:].tolist()]}, "not finite for 1 of 6"),
        (lambda p: {"logits": [[1e300, 0, 0], *right(p)[1:].tolist()]}, "not finite for 1 of 6"),
        (lambda p: {"logits": [[0.0], [0.0, 1.0]]}, "need JSON"),
        (lambda p: {"labels": [3] * len(p)}, "labels from 3 to 3"),
        (lambda p: {"labels": [-1] * len(p)}, "labels from -1"),
        (lambda p: {"labels": [0.5] * len(p)}, "answered float64"),
        (lambda p: {"answer": 1}, "need JSON"),
        (lambda p: b"<html>", "need JSON"),
        (404, "HTTP 404"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_wrong_answer_is_refused_at_once(server: Server, reply: Any, why: str) -> None:
    server.replies = [reply]
    with pytest.raises(DataError, match=why):
        BlackBox(server.url, 3)(IMAGES)
    assert server.asked == 1


def test_nobody_there_is_said_with_the_address() -> None:
    with pytest.raises(EnvironmentProblem, match=r"127\.0\.0\.1:1/: no answer after 1 tries"):
        BlackBox("http://127.0.0.1:1/", 3, retries=0)(IMAGES)


def test_the_budget_ends_before_it_is_passed_and_retries_are_in_it(server: Server) -> None:
    box = BlackBox(server.url, 3, budget=14)
    box(IMAGES)
    server.replies = [500]
    with pytest.raises(EnvironmentProblem, match="12 of 14 images are sent and 6 more are needed"):
        box(IMAGES)
    assert (box.sent, server.asked) == (12, 2)


def test_the_rate_holds_over_calls() -> None:
    box, started = BlackBox(right, 3, rate=200), time.monotonic()
    for _ in range(4):
        box(IMAGES)
    assert time.monotonic() - started >= 3 * 6 / 200


class Sealed:
    """Answers, and raises at whatever else one does to a model."""

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        assert type(pixels) is np.ndarray
        assert np.isfinite(pixels).all()
        return right(pixels)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AssertionError(f"the black box was asked for its {name}")


def test_a_function_is_called_and_nothing_else_and_rows_without_a_value_are_not_sent() -> None:
    box = BlackBox(Sealed(), 3)
    images = IMAGES.clone()
    images[2, 0, 1, 1] = torch.nan
    found = box(images.requires_grad_())
    assert not found.requires_grad
    assert found[2].isnan().all()
    assert (box.sent, int(found.isfinite().all(dim=1).sum())) == (5, 5)


def test_a_function_that_raises_has_not_answered() -> None:
    def broken(pixels: np.ndarray) -> np.ndarray:
        raise KeyError("inside")

    with pytest.raises(DataError, match="broken: KeyError: 'inside'"):
        BlackBox(broken, 3)(IMAGES)


@pytest.mark.parametrize("endpoint", ["nowhere_at_all:f", "json:no_such", "json", ":"])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(UsageError, match="need module:function or http"):
        BlackBox(endpoint, 3)


def test_votes_of_a_label_are_the_labels() -> None:
    box = BlackBox(lambda pixels: right(pixels).argmax(1), 3)

    def votes(classify: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return sample_votes(
            IMAGES, torch.arange(6), lambda x, noise: x + 0.3 * noise, [classify], num_classes=3, seed=1,
            stream=Stream.AUDIT, start=0, size=20, batch_size=32,
        )  # fmt: skip

    assert torch.equal(votes(box), votes(lambda x: torch.from_numpy(right(x.numpy()))))
