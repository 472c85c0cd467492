"""Frames of a video file, decoded by PyAV (FFmpeg). What is decoded is what was asked for: a container that points to
other files or addresses is none of the formats here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ssmprune_cli.data.image_file import check_pixels
from ssmprune_cli.errors import DataError, shown
from ssmprune_cli.files import open_regular

# FFmpeg's name of the format behind a suffix. It is given, not guessed: a guess may be a playlist, which opens others.
_FORMATS = {
    ".avi": "avi",
    ".m4v": "mov",
    ".mkv": "matroska",
    ".mov": "mov",
    ".mp4": "mov",
    ".mpeg": "mpeg",
    ".mpg": "mpeg",
    ".webm": "matroska",
}
VIDEO_SUFFIXES = frozenset(_FORMATS)


def read_video(path: Path, choose: Callable[[int], Sequence[int]]) -> tuple[list[Image.Image], int]:
    """Of the video at `path` the frames at the positions that `choose` gives for their number, and that number.

    Raises DataError for whatever keeps it from being read, and where PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise DataError(
            "PyAV, which reads videos, is not installed",
            where=str(path),
            hint="`pip install 'ssmprune[video]'`, or give each clip as a folder of frames.",
        ) from error
    with open_regular(path, DataError) as file:
        try:
            total = _count(av, file, path)
            if not total:
                raise ValueError("it has no frames")
            positions = choose(total)
            file.seek(0)
            found = _decoded(av, file, path, set(positions))
            missing = sorted(set(positions).difference(found))
            if missing:
                raise ValueError(f"it ends before frame {missing[0] + 1} of {total}")
            return [found[position] for position in positions], total
        except Exception as error:  # of FFmpeg, one class for each kind of damage
            reason = "there is not enough memory" if isinstance(error, MemoryError) else shown(str(error))
            raise DataError(f"cannot be read as a video: {reason}", where=str(path)) from error


def _open(av: Any, file: Any, path: Path) -> Any:
    return av.open(file, format=_FORMATS[path.suffix.lower()], metadata_errors="replace")


def _count(av: Any, file: Any, path: Path) -> int:
    """Frames of the video, by its parcels of data: what a header says of their number may be wrong or missing."""
    with _open(av, file, path) as container:
        if not container.streams.video:
            raise ValueError("it has sound and no pictures" if container.streams.audio else "it has no pictures")
        return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)


def _decoded(av: Any, file: Any, path: Path, positions: set[int]) -> dict[int, Image.Image]:
    """The frames at `positions`, as far as there are any; what comes after the last of them is not decoded."""
    found: dict[int, Image.Image] = {}
    last = max(positions)
    with _open(av, file, path) as container:
        stream = container.streams.video[0]
        check_pixels(stream.codec_context.width, stream.codec_context.height)
        for position, frame in enumerate(container.decode(stream)):
            if position in positions:
                check_pixels(frame.width, frame.height)
                found[position] = frame.to_image()
            if position == last:
                break
    return found
