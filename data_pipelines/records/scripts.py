"""The writing system of a text, from the Unicode blocks that most of its letters belong to."""

from __future__ import annotations

import numpy as np

# First code point of a range and its script; a range ends where the next begins. "" = not a letter of a listed script.
_RANGES: tuple[tuple[int, str], ...] = (
    (0x0000, ""), (0x0041, "latin"), (0x005B, ""), (0x0061, "latin"), (0x007B, ""), (0x00AA, "latin"), (0x00AB, ""),
    (0x00C0, "latin"), (0x00D7, ""), (0x00D8, "latin"), (0x00F7, ""), (0x00F8, "latin"), (0x02B0, ""),
    (0x0370, "greek"), (0x0400, "cyrillic"), (0x0530, "armenian"), (0x0590, "hebrew"), (0x0600, "arabic"),
    (0x0700, "other"), (0x0750, "arabic"), (0x0780, "other"), (0x08A0, "arabic"), (0x0900, "devanagari"),
    (0x0980, "bengali"), (0x0A00, "other"), (0x0B80, "tamil"), (0x0C00, "telugu"), (0x0C80, "other"),
    (0x0E00, "thai"), (0x0E80, "other"), (0x10A0, "georgian"), (0x1100, "hangul"), (0x1200, "other"),
    (0x1C80, "cyrillic"), (0x1C90, "georgian"), (0x1CC0, "other"), (0x1E00, "latin"), (0x1F00, "greek"), (0x2000, ""),
    (0x2C00, "other"), (0x2C60, "latin"), (0x2C80, "other"), (0x2DE0, "cyrillic"), (0x2E00, ""), (0x2E80, "han"),
    (0x3000, ""), (0x3005, "han"), (0x3008, ""), (0x3041, "kana"), (0x3130, "hangul"), (0x3190, ""), (0x31F0, "kana"),
    (0x3200, ""), (0x3400, "han"), (0x4DC0, ""), (0x4E00, "han"), (0xA000, "other"), (0xA640, "cyrillic"),
    (0xA6A0, "other"), (0xA720, "latin"), (0xA800, "other"), (0xAC00, "hangul"), (0xD800, ""), (0xF900, "han"),
    (0xFB00, "latin"), (0xFB13, "armenian"), (0xFB1D, "hebrew"), (0xFB50, "arabic"), (0xFE00, ""), (0xFE70, "arabic"),
    (0xFEFF, ""), (0xFF21, "latin"), (0xFF3B, ""), (0xFF41, "latin"), (0xFF5B, ""), (0xFF66, "kana"),
    (0xFFA0, "hangul"), (0xFFE0, ""), (0x10000, "other"), (0x1D400, ""), (0x20000, "han"), (0x323B0, ""),
)  # fmt: skip

# Number 0: a text without letters. The order is stored in index files: append only.
SCRIPTS: tuple[str, ...] = (
    "none", "latin", "greek", "cyrillic", "armenian", "hebrew", "arabic", "devanagari", "bengali", "tamil", "telugu",
    "thai", "georgian", "hangul", "kana", "han", "other",
)  # fmt: skip

_STARTS = np.array([start for start, _ in _RANGES])
_CLASS = np.array([SCRIPTS.index(name or "none") for _, name in _RANGES])
_SAMPLED = 4096  # characters examined


def script_of(text: str) -> int:
    """Index into SCRIPTS. Any kana beside Han makes a text "kana" (Japanese), since Chinese has none."""
    if text.isascii():  # most captions; case conversion changes nothing in a text without letters
        return SCRIPTS.index("latin") if text.lower() != text.upper() else 0
    codes = np.frombuffer(text[:_SAMPLED].encode("utf-32-le", "surrogatepass"), np.uint32)
    counts = np.bincount(_CLASS[np.searchsorted(_STARTS, codes, side="right") - 1], minlength=len(SCRIPTS))
    counts[0] = 0
    kana, han = SCRIPTS.index("kana"), SCRIPTS.index("han")
    if counts[kana]:
        counts[kana] += counts[han]
        counts[han] = 0
    return int(counts.argmax()) if counts.any() else 0
