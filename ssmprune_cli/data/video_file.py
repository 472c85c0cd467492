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
_SLACK = 0.5  # seconds by which a whole file may end before the time that it states


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
            positions = choose(total)
            found, decoded = _decoded(av, file, path, set(positions))
            if decoded != total:  # a cut has left parcels that show nothing: those before it, or without what they need
                positions, total = choose(decoded), decoded
                found, _ = _decoded(av, file, path, set(positions))
            return [found[position] for position in positions], total
        except Exception as error:  # of FFmpeg, one class for each kind of damage
            reason = "there is not enough memory" if isinstance(error, MemoryError) else shown(str(error))
            raise DataError(f"cannot be read as a video: {reason}", where=str(path)) from error


def _open(av: Any, file: Any, path: Path) -> Any:
    file.seek(0)
    return av.open(file, format=_FORMATS[path.suffix.lower()], metadata_errors="replace")


def _count(av: Any, file: Any, path: Path) -> int:
    """Frames of the video, by its parcels of data: what a header says of their number may be wrong or missing.

    Raises ValueError for none, and for a file that ends before the time that it states.
    """
    with _open(av, file, path) as container:
        if not container.streams.video:
            raise ValueError("it has sound and no pictures" if container.streams.audio else "it has no pictures")
        total, end = 0, 0.0
        for packet in container.demux():
            if packet.is_corrupt:
                raise ValueError("a part of it is missing or damaged")
            if packet.size and packet.stream == container.streams.video[0]:
                total += 1
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        stated = (container.duration or 0) / av.time_base
    if not total:
        raise ValueError("it has no frames")
    if end < stated - _SLACK:
        raise ValueError(f"it ends after {end:.1f} of {stated:.1f} seconds")
    return total


def _decoded(av: Any, file: Any, path: Path, positions: set[int]) -> tuple[dict[int, Image.Image], int]:
    """The frames at `positions`, upright, and how many there are in all. ValueError for a damaged one."""
    found: dict[int, Image.Image] = {}
    total = 0
    with _open(av, file, path) as container:
        stream = container.streams.video[0]
        check_pixels(stream.codec_context.width, stream.codec_context.height)
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ValueError(f"frame {total + 1} is damaged")
            if total in positions:
                check_pixels(frame.width, frame.height)
                image = frame.to_image()
                found[total] = image.rotate(frame.rotation, expand=True) if frame.rotation else image
            total += 1
    if not total:
        raise ValueError("none of its frames can be decoded")
    return found, total
