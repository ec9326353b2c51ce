"""Headless Chromium, driven through its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_START_S = 60


class Tab:
    """One page of a browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._numbers = socket, itertools.count(1)
        self.faults: list[str] = []  # what the page threw or logged as an error, and blocked requests

    async def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async for message in self._socket:
            reply = message.json()
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]
            self._note(reply)
        raise AssertionError("the browser closed the connection")

    def _note(self, event: dict[str, Any]) -> None:
        details = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.faults.append(str(details["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and details["entry"]["level"] == "error":
            self.faults.append(details["entry"]["text"])

    async def open(self, url: str, width: int = 1280, height: int = 800, mobile: bool = False) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def run(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        reply = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    async def until(self, condition: str) -> None:
        """Waits until an expression is true."""
        async with asyncio.timeout(60):
            while not await self.run(condition):
                await asyncio.sleep(0.02)

    async def type(self, text: str, enter: bool = True) -> None:
        """Types into the focused element, as from a keyboard."""
        await self.call("Input.insertText", text=text)
        if enter:
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            await self.call("Input.dispatchKeyEvent", type="keyDown", **key)
            await self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    async def drop(self, data: bytes, kind: str = "image/png") -> None:
        """Drops a file on the page."""
        text = base64.b64encode(data).decode()
        await self.run(
            f"""(() => {{
              const bytes = Uint8Array.from(atob("{text}"), (letter) => letter.charCodeAt(0));
              const dataTransfer = new DataTransfer();
              dataTransfer.items.add(new File([bytes], "picture", {{ type: "{kind}" }}));
              document.body.dispatchEvent(new DragEvent("drop", {{ dataTransfer, bubbles: true, cancelable: true }}));
            }})()"""
        )

    async def screenshot(self, file: Path) -> None:
        reply = await self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(reply["data"]))


@contextlib.asynccontextmanager
async def tab() -> AsyncIterator[Tab]:
    """A page in a new browser."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        flags = [
            "--headless=new",
            "--disable-gpu",
            "--no-first-run",
            "--remote-debugging-port=0",
            "--disable-dev-shm-usage",
        ]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = subprocess.Popen(
            [BINARY, *flags, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = await _port(Path(folder) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as reply:
                    pages = [each for each in await reply.json() if each["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield Tab(socket)
        finally:
            browser.terminate()
            browser.wait(30)


async def _port(file: Path) -> int:
    async with asyncio.timeout(_START_S):
        while not (file.is_file() and file.read_text().strip()):
            await asyncio.sleep(0.05)
    return int(file.read_text().split()[0])
