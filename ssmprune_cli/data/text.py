"""Text: windows of tokens that follow one another, each with the tokens that come next."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from ssmprune_cli.data.datasets import ImageDataset, Split
from ssmprune_cli.data.files import check_folder
from ssmprune_cli.data.tokenizer import Encode
from ssmprune_cli.errors import DataError, UsageError, listing, shown
from ssmprune_cli.files import read_bytes
from ssmprune_cli.preprocessing import Frame, Preparation, TextWindow

_MOST_BYTES = 1 << 28  # of a text
_SUFFIX = ".txt"


class TextWindows(ImageDataset):
    """Windows of `window.length` tokens, one after the other in each text; what is left at its end is not read. The
    target of a window are the tokens that follow each of its own, a tuple as long.

    texts  name, and numbers of tokens (n,)
    """

    def __init__(self, texts: Sequence[tuple[str, Tensor]], window: TextWindow, where: str) -> None:
        self._window = window
        self._texts = texts
        length = window.length
        self._places = [
            (number, start) for number, (_, ids) in enumerate(texts) for start in range(0, len(ids) - length, length)
        ]
        if not self._places:
            longest = max((len(ids) for _, ids in texts), default=0)
            raise DataError(
                f"has {longest:,} tokens in a row, and a window takes {length:,} and the one after them",
                where=where,
                hint="Give a longer text, or shorter windows: `--length`.",
            )

    def __len__(self) -> int:
        return len(self._places)

    @property
    def notes(self) -> tuple[str, ...]:
        """Which texts have no window."""
        read = {number for number, _ in self._places}
        short = [name for number, (name, _) in enumerate(self._texts) if number not in read]
        if not short:
            return ()
        some, least = f"{len(short)} of {len(self._texts)} texts", self._window.length + 1
        return (f"{some} are not read, for want of {least:,} tokens: {listing(short)}.",)

    def image(self, index: int) -> Image.Image:
        raise UsageError("a text is no image, so there is nothing to draw", where=self.name(index))

    def ids(self, index: int) -> Tensor:
        """(length,) int64."""
        number, start = self._places[index]
        return self._texts[number][1][start : start + self._window.length]

    def prepared(self, index: int, way: Preparation) -> tuple[Tensor, Frame]:
        if way != self._window:
            raise DataError(
                f"the text was divided into {self._window}, and a model takes {way}",
                hint="Give models that are compared the same `--length` and `--protect-last`.",
            )
        size = (1, self._window.length)
        return self.ids(index), Frame(size, size)

    def target(self, index: int) -> tuple[int, ...]:
        number, start = self._places[index]
        return tuple(self._texts[number][1][start + 1 : start + self._window.length + 1].tolist())

    def name(self, index: int) -> str:
        number, start = self._places[index]
        return f"{self._texts[number][0]}[{start}]"

    def content(self, index: int) -> bytes:
        return hashlib.sha256(self.ids(index).numpy().tobytes()).digest()


class Texts:
    """The texts in files, by name, as they were read."""

    def __init__(self, root: Path, contents: Sequence[tuple[str, bytes]]) -> None:
        self._root, self._contents = root, contents

    def windows(self, encode: Encode, window: TextWindow) -> TextWindows:
        """Raises DataError for what is no text, a token beyond the vocabulary, and texts shorter than a window."""
        texts = []
        for name, content in self._contents:
            ids = encode(content, name)
            if len(ids) and int(ids.max()) >= window.vocabulary:
                raise DataError(
                    f"has the token {int(ids.max())}, and the model's vocabulary has {window.vocabulary:,}", where=name
                )
            texts.append((name, ids))
        return TextWindows(texts, window, str(self._root))


def open_text(root: Path, split: Split = "val") -> Texts:
    """A text file, or all .txt files below a folder in the order of their paths. Both splits are the same.

    Raises DataError for a file that cannot be read, and if there is no text.
    """
    if root.exists() and not root.is_dir():
        files, base = [root], root.parent
    else:
        check_folder(root)
        below = (path for path in root.rglob(f"*{_SUFFIX}") if path.is_file())
        files, base = sorted(path for path in below if not path.name.startswith(".")), root
        if not files:
            raise DataError(f"has no {_SUFFIX} files", where=str(root))
    contents = [(shown(file.relative_to(base).as_posix()), read_bytes(file, _MOST_BYTES, DataError)) for file in files]
    if not any(content.strip() for _, content in contents):
        raise DataError("is empty: there is no text in it", where=str(root))
    return Texts(root, contents)
