"""Small videos for tests, made by PyAV, and what it decodes of them from the first to the last frame."""

from __future__ import annotations

import io
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


def moving(number: int, count: int, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: a bar that grows on a ground that grows lighter; no turn of it is like another."""
    pixels = np.full((height, width, 3), 20 + 180 * number // max(1, count), np.uint8)
    pixels[: height // 2, : max(1, (number + 1) * width // count)] = (200, 40, 40)
    pixels[height // 2 :, : width // 4] = (40, 40, 200)
    return pixels


def video(
    container: str = "mp4",
    codec: str = "libx264",
    count: int = 40,
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    varying: bool = False,
    rotation: int = 0,
    sound: bool = False,
    pictures: bool = True,
    **options: str,
) -> bytes:
    """An encoded video of ``count`` frames; ``varying``: at distances that grow."""
    import av

    path = Path(tempfile.mkdtemp()) / "video"
    with av.open(str(path), "w", format=container, options=options) as file:
        stream: Any = None
        if pictures:
            stream = file.add_stream(codec, rate=fps, options={"threads": "1"})
            stream.width, stream.height, stream.pix_fmt = *size, "rgb8" if codec == "gif" else "yuv420p"
            stream.gop_size, stream.codec_context.time_base = 12, Fraction(1, 1000)
            if rotation:
                stream.set_display_rotation(rotation)
        tone = file.add_stream("aac" if container == "mp4" else "libopus", rate=48000) if sound else None
        for number in range(count if pictures else 0):
            frame = av.VideoFrame.from_ndarray(moving(number, count, *size), "rgb24")
            frame.pts, frame.time_base = number * number * 5 if varying else number * 1000 // fps, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        if pictures:
            file.mux(stream.encode(None))
        if tone is not None:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 48000, 0
            file.mux([*tone.encode(frame), *tone.encode(None)])
    data = path.read_bytes()
    shutil.rmtree(path.parent)
    return data


def all_frames(data: bytes) -> list[tuple[float, np.ndarray]]:
    """(seconds from the first frame, pixels as stored) of every frame, decoded in order."""
    import av

    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.video[0]
        frames = list(file.decode(stream))
        return [(float((f.pts - frames[0].pts) * stream.time_base), f.to_ndarray(format="rgb24")) for f in frames]
