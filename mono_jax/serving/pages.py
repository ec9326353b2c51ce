"""Which pages of the cache belong to which request, and which hold the start of a prompt that may come again."""

from __future__ import annotations

import collections
import copy
import hashlib
from collections.abc import Sequence

import numpy as np

from mono_jax.generation.prompts import Prompt
from mono_jax.models.architecture import Architecture

NOBODY = 0  # the page that padding is written to; it belongs to no request


class Pages:
    """Hands out pages 1 to ``count``; several requests may hold the same page if its content is known.

    A page that no request holds keeps its content until it is needed: the least recently used one is reassigned first.
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count, 0, -1))
        self._holders = [0] * (count + 1)
        self._of_content: dict[bytes, int] = {}
        self._content: dict[int, bytes] = {}
        self._reusable: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def used(self) -> int:
        """The number of pages that requests hold."""
        return self.count - len(self._free) - len(self._reusable)

    @property
    def reusable(self) -> int:
        """The number of pages with known content that no request holds."""
        return len(self._reusable)

    def found(self, contents: Sequence[bytes]) -> list[int]:
        """The pages of the first ``contents``, up to the first one not found; the caller then holds them."""
        pages = []
        for content in contents:
            if (page := self._of_content.get(content)) is None:
                break
            self._hold(page)
            pages.append(page)
        return pages

    def take(self, count: int) -> list[int] | None:
        """``count`` pages for the caller to hold; None, without any change, if there are not enough."""
        if count > len(self._free) + len(self._reusable):
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._reusable.popitem(last=False)
                del self._of_content[self._content.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def fill(self, page: int, content: bytes) -> None:
        """Records the content of a page that is held; of pages with equal content, the first is the one found."""
        if page not in self._content and content not in self._of_content:
            self._of_content[content], self._content[page] = page, content

    def release(self, pages: Sequence[int]) -> None:
        """Releases ``pages``. The last ones are reassigned first: without the first ones they could not be found."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._content:
                    self._reusable[page] = None
                else:
                    self._free.append(page)

    def _hold(self, page: int) -> None:
        self._reusable.pop(page, None)
        self._holders[page] += 1


class Contents:
    """The content of each full page of a request's tokens: a digest of all tokens up to the page's end.

    Equal digests mean equal keys and values: the same tokens, pixels, and angles by which keys were rotated.
    """

    def __init__(self, config: Architecture, prompt: Prompt, page: int):
        """``prompt``: as ``check_prompt`` gives it."""
        self._page = page
        tokens = len(prompt.input_ids)
        scaling = config.rope_scaling
        dynamic = scaling is not None and scaling.type == "dynamic"
        limit = config.max_position_embeddings
        # Dynamic scaling rotates a longer prompt by its own angles, and answers beyond it by angles for each position.
        self._limit = limit if dynamic else None
        self._last = _digest(str(tokens if dynamic and tokens > limit else 0).encode())
        self._waiting = np.zeros((0, 3), np.uint64)
        self._length = 0
        self.digests: list[bytes] = []
        self._add(_identities(config, prompt))
        self._grows = not dynamic or tokens <= limit

    def copy(self) -> Contents:
        """A copy that tokens can be appended to."""
        result = copy.copy(self)
        result.digests = self.digests.copy()
        return result

    def add(self, tokens: Sequence[int]) -> None:
        """Appends the tokens of an answer."""
        ids = np.zeros((len(tokens), 3), np.uint64)
        ids[:, 0] = tokens
        if self._grows:
            self._add(ids if self._limit is None else ids[: max(0, self._limit - self._length)])

    def _add(self, identities: np.ndarray) -> None:
        self._length += len(identities)
        waiting = np.concatenate([self._waiting, identities])
        full = len(waiting) // self._page * self._page
        for start in range(0, full, self._page):
            content = waiting[start : start + self._page].tobytes()
            self._last = _digest(self._last, content)
            self.digests.append(self._last)
        self._waiting = waiting[full:]


def _identities(config: Architecture, prompt: Prompt) -> np.ndarray:
    """uint64 [n, 3]: (id, 0, 0) for a text token; (position in its run, digest) for a visual one.

    The digest covers all pixels of a run of visual tokens, because bidirectional attention mixes all tiles of an image;
    of a modular model, all tiles of which it has a part, because encoders mix the pixels of a tile.
    """
    ids = np.asarray(prompt.input_ids)
    identities = np.zeros((len(ids), 3), np.uint64)
    identities[:, 0] = ids
    if not len(prompt.patches):
        return identities
    is_visual = ids == config.image_token_id
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_visual.astype(np.int8), [0]])))
    tile = 1 if config.is_monolithic else config.vision.tile_tokens
    seen = 0
    for start, stop in edges.reshape(-1, 2):
        first, seen = seen, seen + stop - start
        part = slice(first // tile * tile, -(-seen // tile) * tile)
        digest = _digest(prompt.patch_cells[part].tobytes(), np.ascontiguousarray(prompt.patches[part]))
        identities[start:stop, 0] = np.arange(stop - start)
        identities[start:stop, 1:] = np.frombuffer(digest, np.uint64)
    return identities


def _digest(*parts: bytes | np.ndarray) -> bytes:
    """16 bytes of SHA-256, for which processors have instructions: pixels are hashed before the first token."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.digest()[:16]
