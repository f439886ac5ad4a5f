"""Headless Chromium, driven by its DevTools protocol: a page, what it says, what it asks for, a picture of it."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-extensions", "--disable-background-networking", "--disable-component-update",
         "--remote-debugging-port=0", "--window-size=1500,1000")  # fmt: skip


def chromium() -> str | None:
    """The browser's program, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One tab. ``requests``: URLs asked for; ``complaints``: console errors and exceptions; of all pages so far."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.requests: list[str] = []
        self.complaints: list[str] = []

    async def listen(self) -> None:
        async for message in self._socket:
            event = json.loads(message.data)
            if "id" in event:
                self._answers.pop(event["id"]).set_result(event)
            elif event["method"] == "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])
            elif event["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(event["params"]["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                self.complaints.append(json.dumps(event["params"]["entry"]))
            elif event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] == "error":
                self.complaints.append(json.dumps(event["params"]["args"]))

    async def call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        answer = await asyncio.wait_for(self._answers[number], 60)
        assert "error" not in answer, answer
        return answer["result"]

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer["result"].get("value")

    async def text_with(self, *wanted: str, limit: float = 90, click: str = "") -> str:
        """The page's visible text, once it holds all that is wanted. ``click``: a selector of what shows it; clicked
        every 5 s, as a page that is still being made takes no click."""
        loop = asyncio.get_running_loop()
        until = loop.time() + limit
        clicked = 0.0
        while True:
            text = await self.evaluate("document.body ? document.body.innerText : ''") or ""
            missing = [one for one in wanted if one not in text]
            if not missing:
                return text
            assert loop.time() < until, f"{missing} not on the page:\n{text[:3000]}"
            if click and loop.time() > clicked + 5:
                await self.evaluate(f"document.querySelector({json.dumps(click)})?.click()")
                clicked = loop.time()
            await asyncio.sleep(0.3)

    async def picture(self, path: Path) -> None:
        made = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(made["data"]))


@asynccontextmanager
async def _browser(program: str, folder: Path) -> AsyncIterator[Page]:
    command = [program, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        listens = folder / "profile" / "DevToolsActivePort"
        for _ in range(300):
            if listens.exists() and listens.read_text().count("\n"):
                break
            assert process.poll() is None, "chromium ended at once"
            await asyncio.sleep(0.2)
        port = listens.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = await answer.json()
            url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(url, max_msg_size=0) as socket:
                page = Page(socket)
                listening = asyncio.create_task(page.listen())
                for domain in ("Page", "Network", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                yield page
                listening.cancel()
    finally:
        process.kill()
        process.wait()


def browse(folder: Path, visit: Callable[[Page], Awaitable[None]]) -> None:
    """Run ``visit`` in a browser whose profile is below ``folder``."""
    program = chromium()
    assert program is not None

    async def main() -> None:
        async with _browser(program, folder) as page:
            await visit(page)

    asyncio.run(main())
