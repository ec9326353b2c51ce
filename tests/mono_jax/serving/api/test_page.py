"""The page at / in headless Chromium: an image is dropped, a question asked, and the answer streams in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed: pip install '.[serve]'")
pytest.importorskip("aiohttp")

from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from tests.mono_jax.serving.api.browser import BINARY, Tab, tab
from tests.mono_jax.serving.api.running_server import Client, picture, serving
from tests.mono_jax.serving.api.scripted import ScriptedEngine

pytestmark = pytest.mark.skipif(BINARY is None, reason="Chromium is not installed")
LAST = "[...document.querySelectorAll('.assistant')].at(-1)"
SIZES = {"desktop": (1280, 800, False), "phone": (390, 844, True)}


def in_browser(work: Callable[[Tab], Awaitable[None]]) -> None:
    """Runs ``work(tab)``."""

    async def whole() -> None:
        async with tab() as page:
            await work(page)

    asyncio.run(whole())


async def answered(page: Tab) -> str:
    """The last answer, once it has ended."""
    await page.until(f"{LAST} && !{LAST}.classList.contains('busy')")
    return await page.run(f"{LAST}.querySelector('.said').textContent")


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_is_dropped_asked_about_and_answered(size: str, client: Client, engine: ScriptedEngine):
    questions = []
    engine.script, plain = lambda prompt, sampling: questions.append(prompt) or plain(prompt, sampling), engine.script

    async def work(page: Tab) -> None:
        await page.open(client.url, *SIZES[size])
        await page.until("document.getElementById('dot').className === 'ok'")
        await page.drop(picture(1, 64, 32))
        await page.until("document.querySelectorAll('#thumbs img').length === 1")
        engine.hold()
        await page.type("What is <b>this</b>?")
        await page.until(f"{LAST} !== undefined && {LAST}.classList.contains('busy')")
        assert await page.run("document.querySelectorAll('.user .pictures img').length") == 1
        assert await page.run("document.querySelector('.user .said').textContent") == "What is <b>this</b>?"
        engine.release()
        assert (await answered(page)).startswith("seen ")
        assert "tokens in" in await page.run(f"{LAST}.querySelector('.facts').textContent")

        await page.type("And now?")
        await page.until("document.querySelectorAll('.assistant').length === 2")
        await answered(page)
        assert await page.run("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the screen"
        assert page.faults == []

    try:
        in_browser(work)
    finally:
        engine.release()
        engine.script = plain
    assert [0 if prompt.patches is None else len(prompt.patches) for prompt in questions] == [48, 48]
    told = engine.tokenizer.decode(questions[1].input_ids)
    assert "What is <b>this</b>?" in told and "seen " in told and "And now?" in told


def test_an_answer_is_stopped_and_begun_anew(client: Client, engine: ScriptedEngine):
    async def work(page: Tab) -> None:
        await page.open(client.url)
        engine.hold()
        await page.type("Long?")
        while not engine.under_way:
            await asyncio.sleep(0.01)
        await page.run("document.getElementById('send').click()")
        await page.until(f"{LAST}.querySelector('.fault') !== null")
        assert await page.run(f"{LAST}.querySelector('.fault').textContent") == "stopped"
        while engine.under_way:
            await asyncio.sleep(0.01)
        await page.run("document.getElementById('new').click()")
        assert await page.run("document.querySelectorAll('.turn').length") == 0
        assert page.faults == []

    try:
        in_browser(work)
    finally:
        engine.release()


def test_an_answer_cut_by_a_new_conversation_is_not_part_of_it(client: Client, engine: ScriptedEngine):
    told, plain = [], engine.script

    def script(prompt: Prompt, sampling: Sampling) -> str:
        told.append(engine.tokenizer.decode(prompt.input_ids))
        return plain(prompt, sampling)

    async def work(page: Tab) -> None:
        await page.open(client.url)
        await page.type("First?")
        await answered(page)
        engine.hold(3)
        await page.type("Second?")
        await page.until("document.querySelectorAll('.assistant').length === 2")
        await page.until(f"{LAST}.querySelector('.said').textContent !== ''")
        await page.run("document.getElementById('new').click()")
        await page.until("document.getElementById('send').textContent === 'Ask'")
        assert await page.run("document.getElementById('new').disabled")
        engine.release()
        await page.run("document.getElementById('question').focus()")
        await page.type("Third?")
        await answered(page)
        assert page.faults == []

    engine.script = script
    try:
        in_browser(work)
    finally:
        engine.release()
        engine.script = plain
    asked = ["First?", "Second?", "Third?"]
    assert [[text in prompt for text in asked] for prompt in told] == [
        [True, False, False],
        [True, True, False],
        [False, False, True],
    ]


def test_errors_and_keys_are_shown(engine: ScriptedEngine):
    with serving(engine, keys=["secret"]) as client:

        async def work(page: Tab) -> None:
            await page.open(client.url)
            await page.until("document.getElementById('dot').className === 'bad'")
            assert await page.run("document.getElementById('more').open")
            await page.run("document.getElementById('key').value = 'secret'")
            await page.run("document.getElementById('key').onchange()")
            await page.until("document.getElementById('dot').className === 'ok'")
            await page.drop(b"no picture")
            await page.until("document.querySelectorAll('#thumbs img').length === 1")
            await page.run("document.getElementById('question').focus()")
            await page.type("What is it?")
            await page.until(f"{LAST} && {LAST}.querySelector('.fault') !== null")
            assert "image 1: a file that begins with" in await page.run(f"{LAST}.querySelector('.fault').textContent")

        in_browser(work)
