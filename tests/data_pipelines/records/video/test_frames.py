"""Frames of videos at random access, against all frames decoded in order; and files that are none, or damaged."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import BadSample, DataError, StorageError
from data_pipelines.records.raw_sample import Video
from data_pipelines.records.video.frames import Sampling, VideoFile, VideoHeader, read_frames, read_header
from tests.data_pipelines.video_tools import all_frames, video

pytest.importorskip("av")

WHOLE, EIGHT = Video(""), Sampling()
CLIPS = {
    "mp4": {},
    "fragments": {"movflags": "frag_keyframe+empty_moov"},
    "mkv": {"container": "matroska"},
    "webm": {"container": "webm", "codec": "libvpx-vp9"},
    "ts": {"container": "mpegts"},
    "avi": {"container": "avi", "codec": "mpeg4"},
    "gif": {"container": "gif", "codec": "gif"},
    "varying": {"varying": True},
    "varying mkv": {"container": "matroska", "varying": True},
    "sound": {"sound": True},
    "one frame": {"count": 1},
    "long": {"count": 400, "fps": 25},
}


def frames_of(data: bytes, sampling: Sampling = EIGHT, part: Video = WHOLE) -> list[np.ndarray]:
    file = io.BytesIO(data)
    times = sampling.times(read_header(file), part)
    return [np.asarray(Image.open(io.BytesIO(frame))) for frame in read_frames(file, times)]


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(3), Sampling(64, fps=2.5)], ids=str)
def test_random_access_gives_what_decoding_in_order_gives(name: str, sampling: Sampling) -> None:
    data = video(**CLIPS[name])
    header, whole = read_header(io.BytesIO(data)), all_frames(data)
    times = sampling.times(header, WHOLE)
    assert header.size == (64, 48) and len(times) <= max(1, header.frames)
    for seconds, frame in zip(times, frames_of(data, sampling), strict=True):
        shown = [pixels for at, pixels in whole if at <= seconds + 1e-6]
        np.testing.assert_array_equal(frame, shown[-1] if shown else whole[0][1])


def test_frames_are_the_middles_of_equal_parts() -> None:
    header = VideoHeader(64, 48, seconds=10.0, frames=250)
    assert Sampling(4).times(header, WHOLE) == [1.25, 3.75, 6.25, 8.75]
    assert Sampling(4, fps=0.2).times(header, WHOLE) == [2.5, 7.5]
    assert Sampling(4, fps=30).times(header, WHOLE) == Sampling(4).times(header, WHOLE)
    assert Sampling(2).times(header, Video("", 4, 6)) == [4.5, 5.5]
    assert len(Sampling(64).times(VideoHeader(64, 48, 1.0, 3), WHOLE)) == 3
    for frames, fps in ((0, None), (True, None), (8, 0), (8, "2")):
        with pytest.raises(DataError, match="must be"):
            Sampling(frames, fps)


@pytest.mark.parametrize("rotation", [90, 180, 270, -90])
def test_rotated_videos_are_upright(rotation: int) -> None:
    data = video(rotation=rotation)
    header = read_header(io.BytesIO(data))
    assert header.size == ((64, 48) if rotation == 180 else (48, 64))
    seconds, stored = all_frames(data)[2]
    (frame,) = read_frames(io.BytesIO(data), [seconds])
    turned = Image.fromarray(stored).rotate(rotation, expand=True)  # degrees counterclockwise, as FFmpeg counts
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(frame))), np.asarray(turned))


def test_only_the_wanted_parts_of_a_file_are_read(tmp_path: Path) -> None:
    """Of a long video a few frames cost a small part of it."""
    noise = np.random.default_rng(0).integers(0, 255, (2000, 48, 64, 3), np.uint8)
    import av

    with av.open(str(path := tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"threads": "1", "preset": "ultrafast", "qp": "10"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 12
        for pixels in noise:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        file.mux(stream.encode(None))

    class Counted(VideoFile):
        total = 0

        def read(self, length: int = -1) -> bytes:
            data = super().read(length)
            Counted.total += len(data)
            return data

    file = Counted(str(path))
    read_frames(file, Sampling(2).times(read_header(file), WHOLE))
    assert Counted.total < file.size / 3


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_storage_that_fails_meanwhile_is_no_bad_video(reads: int, tmp_path: Path) -> None:
    (path := tmp_path / "a.mp4").write_bytes(video(count=400))

    class Failing(VideoFile):
        left = reads

        def read(self, length: int = -1) -> bytes:
            if not self.left:
                raise StorageError(str(path), "gone")
            self.left -= 1
            return super().read(length)

    file = Failing(str(path))
    file.buffer_size = 1024
    with pytest.raises(StorageError, match="gone"):
        read_frames(file, EIGHT.times(read_header(file), WHOLE))


MP4 = video()
FRONT = video(movflags="faststart", count=100)
STREAM = video("matroska", count=100)
BAD = {
    "nothing": (b"", "empty_video"),
    "a page": (b"<html>not found</html>", "not_a_video"),
    "a playlist": (b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n/etc/passwd\n#EXT-X-ENDLIST\n", "not_a_video"),
    "a list of files": (b"ffconcat version 1.0\nfile /etc/passwd\n", "not_a_video"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not_a_video"),
    "without its index": (MP4[: len(MP4) // 2], "corrupt_video"),
    "sound": (video(pictures=False, sound=True), "no_video_stream"),
    "cut": (FRONT[: len(FRONT) // 2], "truncated_video"),
    "cut without an index": (STREAM[: len(STREAM) // 2], "truncated_video"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_whole_video_has_a_reason(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data, reason = BAD[name]
    with pytest.raises(BadSample) as error:
        frames_of(data)
    assert (error.value.reason, bool(error.value.detail)) == (reason, True)
    assert capfd.readouterr() == ("", "")


def test_damage_never_raises_anything_else() -> None:
    rng = np.random.default_rng(1)
    for data in (MP4, FRONT, video("matroska"), video("webm", "libvpx-vp9", count=10)):
        for _ in range(25):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 30):
                broken[at] = int(rng.integers(256))
            try:
                frames = frames_of(bytes(broken))
            except BadSample as error:
                assert error.reason.endswith(("_video", "_stream", "_large")), error
            else:
                assert all(frame.ndim == 3 for frame in frames)


def test_parts_and_sizes_that_cannot_be() -> None:
    header = VideoHeader(7680, 4320, seconds=7200.0, frames=432_000)
    assert len(Sampling(8).times(header, WHOLE)) == 8
    with pytest.raises(BadSample, match=r"video_too_large \(64 frames of 7680x4320 are .* lower video_frames"):
        Sampling(64).times(header, WHOLE)
    with pytest.raises(BadSample, match=r"empty_video \(second 8000 to 9000 of 7200\)"):
        Sampling(8).times(header, Video("", 8000, 9000))
