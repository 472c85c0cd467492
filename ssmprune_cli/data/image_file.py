"""Decode an image file of a few known formats. What is in the file decides, not its suffix."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ssmprune_cli.errors import DataError, shown
from ssmprune_cli.files import open_regular

# Those behind our suffixes. PIL knows more, and starts Ghostscript for one of them.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_OTHER_KINDS = {
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "a PDF",
    b"8BPS": "a Photoshop file",
    b"<svg": "an SVG drawing",
    b"<?xml": "XML",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"version https://git-lfs": "a Git LFS pointer (run `git lfs pull` where it was cloned)",
    b"\xff\x0a": "JPEG XL",
}
_BRANDS = {b"avif": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC"}


def read_image(path: Path) -> Image.Image:
    """The first image in the file at `path`, in any mode. Raises DataError for whatever keeps it from being read."""
    with open_regular(path, DataError) as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                check_pixels(*image.size)
                _HELD.claim(image.width * image.height)
                image.load()
                return image
        except UnidentifiedImageError as error:
            file.seek(0)
            kind = _kind(file.read(32))
            raise DataError(f"cannot be read as an image: it is {kind}", where=str(path), hint=_HINT) from error
        except Exception as error:  # PIL's decoders raise almost anything on damaged files
            reason = "there is not enough memory" if isinstance(error, MemoryError) else shown(str(error))
            raise DataError(f"cannot be read as an image: {reason}", where=str(path)) from error


_HINT = f"Read are {', '.join(FORMATS[:-1])} and {FORMATS[-1]}."


def check_pixels(width: int, height: int) -> None:
    """Raises ValueError for more pixels than PIL holds to be safe: it only warns up to twice as many."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"{width} x {height} pixels are more than the limit of {limit:,}")


class _Held:
    """The pixels of images that threads hold at once: no more than of the largest image that is read.

    That one takes up to 14 bytes a pixel, those of its decoder included, so that all of them take less than 1.3 GB.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._pixels = 0
        self._thread = threading.local()

    def claim(self, pixels: int) -> None:
        """Wait until there is room for an image of this thread. Without `one_image` around, it is not counted."""
        if not getattr(self._thread, "counts", False):
            return
        limit = Image.MAX_IMAGE_PIXELS
        with self._change:
            self._release()
            self._change.wait_for(lambda: limit is None or self._pixels == 0 or self._pixels + pixels <= limit)
            self._pixels += pixels
            self._thread.pixels = pixels

    @contextmanager
    def one_image(self) -> Iterator[None]:
        self._thread.counts = True
        try:
            yield
        finally:
            self._thread.counts = False
            with self._change:
                self._release()

    def _release(self) -> None:
        self._pixels -= getattr(self._thread, "pixels", 0)
        self._thread.pixels = 0
        self._change.notify_all()


_HELD = _Held()


def one_image() -> AbstractContextManager[None]:
    """Around all that a thread does with an image, from reading it on: many large ones wait for each other."""
    return _HELD.one_image()


def _kind(head: bytes) -> str:
    if not head:
        return "empty"
    if head[4:8] == b"ftyp" and head[8:12] in _BRANDS:
        return _BRANDS[head[8:12]]
    return next((kind for start, kind in _OTHER_KINDS.items() if head.startswith(start)), "damaged or of another kind")
