"""Frames of a video file via PyAV: their number and times from the header, and random access to their pixels.

Frames are identified by a time in seconds, since they need not be equally spaced: the frame that is shown at that time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np

from data_pipelines.errors import BadSample, DataError, StorageError
from data_pipelines.io.blobs import Blob, Positioned
from data_pipelines.io.paths import is_remote
from data_pipelines.records.raw_sample import Video

if TYPE_CHECKING:
    from av import VideoFrame

# Formats that FFmpeg may open. Left out are images, and formats that open other files or URLs (HLS, DASH, concat).
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,ivf,mxf,wtv,nut,h264,hevc"
_MOST_BYTES = 1 << 30  # of the frames of a video, before they become tiles
_READ = {False: 1 << 16, True: 1 << 20}  # bytes per read of local and of remote files
_JUMP_SECONDS = 4.0  # without an index, a frame further ahead than this is searched for from a key frame
_BEFORE_SECONDS = 10.0
_LAST = 64  # entries of an index that are compared with the file's length
_LACKING = 0.1  # missing share of a video above which it counts as truncated

RAW_FRAME = b"P6 "  # start of a frame, which is a PPM image
Still = TypeVar("Still")  # an image, or the path of one


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which frames of a video are used.

    Attributes:
      frames: maximum number of frames per video.
      fps: frames per second, equally spaced; None: always ``frames``, or as many as there are.
    """

    frames: int = 8
    fps: float | None = None

    def __post_init__(self) -> None:
        """Raises DataError."""
        whole = isinstance(self.frames, int) and not isinstance(self.frames, bool)
        if not whole or not 1 <= self.frames <= 4096:
            raise DataError(f"video_frames must be a number from 1 to 4096, got {self.frames!r}")
        if self.fps is not None and (not isinstance(self.fps, int | float) or not self.fps > 0):
            raise DataError(f"video_fps must be a positive number, got {self.fps!r}")

    def stills(self, frames: Sequence[Still]) -> list[Still]:
        """The frames in the middle of equal parts, for frames that are separate images and have no times."""
        count = min(self.frames, len(frames))
        return [frames[(2 * number + 1) * len(frames) // (2 * count)] for number in range(count)]

    def times(self, header: VideoHeader, video: Video) -> list[float]:
        """Seconds from the start: midpoints of equal parts. Raises BadSample "empty_video", "video_too_large"."""
        start, stop = video.start, min(video.stop, header.seconds)
        if not 0 <= start < stop:
            raise BadSample("empty_video", detail=f"second {start:g} to {video.stop:g} of {header.seconds:g}")
        share = (stop - start) / header.seconds
        wanted = self.frames if self.fps is None else min(self.frames, round((stop - start) * self.fps))
        count = max(1, min(wanted, round(header.frames * share)))
        if (size := 3 * header.width * header.height * count) > _MOST_BYTES:
            detail = (
                f"{count} frames of {header.width}x{header.height} are {size >> 20} MiB, at most {_MOST_BYTES >> 20}"
            )
            raise BadSample("video_too_large", detail=f"{detail}: lower video_frames")
        return [start + (number + 0.5) * (stop - start) / count for number in range(count)]


@dataclasses.dataclass(frozen=True)
class VideoHeader:
    """The content of a video's header.

    Attributes:
      width, height: pixels of an upright frame.
      seconds: its duration.
      frames: number of frames; an estimate if the format does not give it.
    """

    width: int
    height: int
    seconds: float
    frames: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


class VideoFile(Positioned, io.RawIOBase):
    """A file, or a part of one, in the form that PyAV reads. Raises StorageError if it cannot be read."""

    def __init__(self, path: str, start: int = 0, length: int | None = None):
        """start, length: the bytes of a member of an archive; None = to the end."""
        self._blob, self._start = Blob(path), start
        self.size = self._blob.size - start if length is None else length
        self.buffer_size = _READ[is_remote(path)]

    def _bytes(self, offset: int, length: int) -> bytes:
        return self._blob.read(self._start + offset, length)


def read_header(file: BinaryIO | VideoFile) -> VideoHeader:
    """The header of a video, completed from one frame, since only a frame tells how frames are rotated.

    Raises BadSample: "empty_video" (no bytes, frames or duration), "not_a_video", "corrupt_video", "no_video_stream".
    """
    with _opened(file) as (container, stream):
        _check_whole(stream, file)
        base, known, rate = stream.time_base, int(stream.frames), stream.average_rate
        seconds = float(stream.duration * base) if stream.duration else _tagged(stream.metadata)
        if not seconds and container.duration:
            seconds = container.duration / 1e6
        frame = next(container.decode(stream), None)
        if frame is None:
            raise BadSample("empty_video", detail="no frame can be decoded")
        height, width = _pixels(frame).shape[:2]
        if not seconds:
            seconds, known = _walked(container, stream)
    if not seconds > 0:
        raise BadSample("empty_video", detail="it has no duration")
    return VideoHeader(width, height, seconds, known or max(1, round(seconds * float(rate or 1))))


def read_frames(file: BinaryIO | VideoFile, times: Sequence[float]) -> list[bytes]:
    """The frames that are shown at ``times`` (seconds from the start, increasing), upright, each as a PPM image.

    Raises BadSample: like ``read_header``, and "truncated_video".
    """
    with _opened(file) as (container, stream):
        cursor = _Cursor(container, stream)
        return [_ppm(_pixels(cursor.at(seconds))) for seconds in times]


class _Cursor:
    """The frame that is shown at a given time; times must increase."""

    def __init__(self, container: Any, stream: Any):
        self._container, self._stream, self._base = container, stream, stream.time_base
        self._origin = stream.start_time or 0
        self._seconds = float((stream.duration or 0) * self._base) or (container.duration or 0) / 1e6
        self._shown: VideoFrame | None = None
        self._next: VideoFrame | None = None  # the following frame; None = there is none
        self._decoder: Iterator[VideoFrame] = iter(())

    def at(self, seconds: float) -> VideoFrame:
        target = self._origin + math.floor(seconds / self._base + 1e-6)
        if self._shown is None or self._is_far(target):
            self._jump(target)
        while self._next is not None and _pts(self._next) <= target:
            self._shown, self._next = self._next, self._pulled()
        if self._shown is None:  # the video's first frame comes late
            self._shown = self._next
        if self._shown is None:
            raise BadSample("empty_video", detail="no frame can be decoded")
        if self._next is None:
            self._check_end(seconds)
        if self._shown.is_corrupt:
            raise BadSample("corrupt_video", detail=f"the frame at {seconds:.1f} s is damaged")
        return self._shown

    def _is_far(self, target: int) -> bool:
        """Whether there is a key frame between the following frame and the one at ``target``."""
        if self._next is None:
            return False
        now, entries = _pts(self._next), self._stream.index_entries
        if len(entries) < 2:
            return (target - now) * self._base > _JUMP_SECONDS
        place = entries.search_timestamp(target, backward=True)
        return place >= 0 and entries[place].timestamp > now

    def _jump(self, target: int) -> None:
        """Seeks a key frame at or before ``target``: formats without a complete index may first find a later one."""
        first = self._origin - round(_BEFORE_SECONDS / self._base)  # decoding order is not display order
        for back in (0.0, 2.0, 10.0, math.inf):
            at = first if math.isinf(back) else max(first, target - round(back / self._base))
            self._container.seek(at, stream=self._stream, backward=True)
            self._decoder = self._container.decode(self._stream)
            self._shown, self._next = None, self._pulled()
            if at == first or (self._next is not None and _pts(self._next) <= target):
                return

    def _pulled(self) -> VideoFrame | None:
        return next((frame for frame in self._decoder if frame.pts is not None), None)

    def _check_end(self, seconds: float) -> None:
        """Raises BadSample if the file ends long before ``seconds``."""
        shown = self._shown
        end = float((_pts(shown) + (shown.duration or 0) - self._origin) * self._base)
        if seconds - end > max(1.0, _LACKING * self._seconds):
            detail = f"nothing after {end:.1f} s, but {self._seconds:.1f} s are declared"
            raise BadSample("truncated_video", detail=detail)


def _pts(frame: VideoFrame | None) -> int:
    return frame.pts  # type: ignore[union-attr]


@contextlib.contextmanager
def _opened(file: BinaryIO | VideoFile) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) of a video. FFmpeg errors become BadSample; storage errors pass through."""
    import av

    av.logging.set_level(av.logging.PANIC)  # damage is counted and listed
    if not file.seek(0, io.SEEK_END):
        raise BadSample("empty_video", detail="0 bytes")
    file.seek(0)
    size, opened = getattr(file, "buffer_size", 1 << 16), False
    try:
        with av.open(file, container_options={"format_whitelist": _FORMATS}, buffer_size=size) as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                kinds = ", ".join(stream.type for stream in container.streams) or "nothing"
                raise BadSample("no_video_stream", detail=f"it holds {kinds}")
            if streams[0].codec_context is None:
                raise BadSample("corrupt_video", detail="its codec is not known")
            streams[0].codec_context.thread_count = 1  # the loader already runs one process per core
            opened = True
            yield container, streams[0]
    except (BadSample, StorageError):
        raise
    except (av.error.FFmpegError, ValueError, TypeError, ArithmeticError) as error:
        reason = "corrupt_video" if opened or _looks_like_one(file) else "not_a_video"
        detail = error.strerror if isinstance(error, av.error.FFmpegError) else str(error)
        raise BadSample(reason, detail=f"{type(error).__name__}: {detail}"[:200]) from None


def _looks_like_one(file: BinaryIO | VideoFile) -> bool:
    """Whether the first bytes are those of a common container."""
    file.seek(0)
    head = file.read(16)
    return head[4:8] in (b"ftyp", b"moov", b"mdat") or head[:4] in (b"\x1aE\xdf\xa3", b"RIFF", b"FLV\x01", b"OggS")


def _check_whole(stream: Any, file: BinaryIO | VideoFile) -> None:
    """Raises BadSample "truncated_video" if, according to an index, a frame is beyond the end of the file."""
    entries = stream.index_entries
    last = (entries[number] for number in range(max(0, len(entries) - _LAST), len(entries)))
    end = max((entry.pos + entry.size for entry in last), default=0)
    place = file.tell()
    if (size := file.seek(0, io.SEEK_END)) < end:
        raise BadSample("truncated_video", detail=f"{size} bytes, but {end} are declared")
    file.seek(place)


def _walked(container: Any, stream: Any) -> tuple[float, int]:
    """(seconds, frames) from a walk through the packets, for files whose header does not say."""
    container.seek(stream.start_time or 0, stream=stream)
    packets = [packet for packet in container.demux(stream) if packet.pts is not None]
    if not packets:
        return 0.0, 0
    first, last = min(p.pts for p in packets), max(p.pts + (p.duration or 0) for p in packets)
    return float((last - first) * stream.time_base), len(packets)


def _tagged(metadata: dict[str, str]) -> float:
    """The duration of a stream from Matroska's tag, such as "00:00:04.040000000"; 0 if there is none."""
    found = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", metadata.get("DURATION", ""))
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3]) if found else 0.0


def _pixels(frame: VideoFrame) -> np.ndarray:
    """uint8 [height, width, 3] RGB, upright: ``rotation`` is in degrees, counterclockwise."""
    return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4)


def _ppm(pixels: np.ndarray) -> bytes:
    height, width = pixels.shape[:2]
    return RAW_FRAME + b"%d %d 255\n" % (width, height) + np.ascontiguousarray(pixels).tobytes()
