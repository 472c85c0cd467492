"""From text to numbers of tokens: by the tokenizer.json beside the weights, or byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ssmprune_cli.errors import DataError, UsageError, shown
from ssmprune_cli.files import read_bytes

TOKENIZER = "tokenizer.json"
BYTES = 256  # the vocabulary of a model of bytes
_MOST_BYTES = 1 << 26  # of a tokenizer.json: the largest published ones have a third of it
_PADDING = 256  # rows of an embedding beyond the tokenizer's vocabulary; published models have a few

Encode = Callable[[bytes, str], Tensor]
"""(content of a file, its name) -> (n,) int64. Raises DataError, naming the file, for what is no text."""


def encoder(folder: Path | None, vocabulary: int) -> Encode:
    """That of a model with `vocabulary` rows in its embedding, loaded from `folder`.

    Raises DataError for a missing tokenizer, or one that does not fit the vocabulary; UsageError if the package that
    reads it is missing.
    """
    file = None if folder is None else folder / TOKENIZER
    if file is not None and file.is_file():
        return _by_tokenizer(file, vocabulary)
    if vocabulary == BYTES:
        return _by_byte
    raise DataError(
        f"there is no {TOKENIZER} beside the weights, and a vocabulary of {vocabulary:,} is not that of {BYTES} bytes",
        where=None if folder is None else str(folder),
        hint=f"Put the model's {TOKENIZER} into the folder of its weights.",
    )


def _by_byte(content: bytes, name: str) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).long() if content else torch.zeros(0).long()


def _by_tokenizer(file: Path, vocabulary: int) -> Encode:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UsageError(
            f"reading {TOKENIZER} takes the package tokenizers", hint="pip install 'ssmprune[text]'"
        ) from error
    try:
        tokenizer = Tokenizer.from_str(read_bytes(file, _MOST_BYTES, DataError).decode("utf-8"))
    except DataError:
        raise
    except Exception as error:  # the package raises Exception itself
        raise DataError(f"is no tokenizer: {shown(str(error))}", where=str(file)) from error
    # What the file asks for of batches that a model is trained on would cut a text, or lengthen it.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if not 0 <= vocabulary - size < _PADDING:
        raise DataError(
            f"has {size:,} tokens, and the model's vocabulary {vocabulary:,}: it is another model's",
            where=str(file),
            hint=f"Put the model's own {TOKENIZER} there.",
        )

    def encode(content: bytes, name: str) -> Tensor:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"is no text in UTF-8 (byte {error.start})", where=name) from error
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)

    return encode
