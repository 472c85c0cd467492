"""Tensors of the three kinds of checkpoint files: zip and legacy files of torch.save, and safetensors.

The file is mapped, and every size is checked against its length before a tensor is made. Nothing in a file is run.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ssmprune_cli.checkpoint.pickled import (
    MAX_BYTES,
    MAX_DIMENSIONS,
    ForeignGlobal,
    OtherTensor,
    Storage,
    StoredTensor,
    TooLarge,
    fits,
    unpickle,
)
from ssmprune_cli.errors import CheckpointError, shown
from ssmprune_cli.files import open_regular

MAX_DIRECTORY = 1 << 23  # bytes of a zip's directory
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
Place = Callable[[Storage], tuple[int, int]]  # storage -> where its bytes start in the file, and how many there are


def damaged(path: Path, what: str = "") -> CheckpointError:
    return CheckpointError(
        f"is cut off or damaged{f': {what}' if what else ''}", where=str(path), hint="Download or copy it again."
    )


class Mapped:
    """Tensors over the bytes of a file, which is not read before they are."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._bytes: Tensor = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._bytes)

    def values(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """(count,): the values from byte `start` on. Raises ValueError if they are not in the file."""
        size = torch.empty((), dtype=dtype).element_size()
        if not 0 <= start <= start + count * size <= len(self._bytes):
            raise ValueError("bytes beyond the end of the file")
        found = self._bytes[start : start + count * size]
        return (found if start % size == 0 else found.clone()).view(dtype)


def read_zip(path: Path) -> Any:
    """The content of a zip written by torch.save. Raises CheckpointError."""
    with open_regular(path, CheckpointError) as file:
        try:
            with zipfile.ZipFile(_Bounded(file)) as archive:
                return _from_zip(path, file, archive)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise damaged(path) from error
        except CheckpointError:
            raise
        except Exception as error:
            raise _unreadable(path, error) from error


def read_legacy(path: Path) -> Any:
    """The content of a file of torch.save before version 1.6. Raises CheckpointError."""
    with open_regular(path, CheckpointError) as file:
        try:
            return _from_legacy(path, file)
        except CheckpointError:
            raise
        except Exception as error:
            raise _unreadable(path, error) from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file and its metadata. Raises CheckpointError."""
    with open_regular(path, CheckpointError) as file:
        try:
            return _from_safetensors(path, file)
        except CheckpointError:
            raise
        except Exception as error:
            raise _unreadable(path, error) from error


class _Bounded(io.RawIOBase):
    """A file for zipfile, which would read a directory of any length into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > MAX_DIRECTORY:
            here = self._file.tell()
            size = self._file.seek(0, io.SEEK_END) - here
            self._file.seek(here)
            if size > MAX_DIRECTORY:
                raise TooLarge("the directory of a zip of this length")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def _from_zip(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> Any:
    records: dict[str, zipfile.ZipInfo] = {}
    for record in archive.infolist():
        if record.filename in records:
            raise damaged(path, f"it has the record {shown(record.filename)} twice")
        records[record.filename] = record
    if any(name.endswith("/constants.pkl") for name in records):
        raise CheckpointError(
            "is a TorchScript program, not weights",
            where=str(path),
            hint="Save `model.state_dict()` with torch.save and give that file.",
        )
    pickles = [name for name in records if name == "data.pkl" or (name.count("/") == 1 and name.endswith("/data.pkl"))]
    if len(pickles) != 1:
        arrays = bool(records) and all(name.endswith(".npy") for name in records)
        what = "a zip of numpy arrays (.npz)" if arrays else "a zip archive, but no PyTorch checkpoint"
        raise CheckpointError(f"is {what}", where=str(path), hint="Unpack it and give the file inside.")
    root = pickles[0].removesuffix("data.pkl")

    def content(name: str) -> tuple[int, int]:
        """Where the bytes of a record start, and how many there are."""
        record = records[name]
        if record.flag_bits & 1:
            raise CheckpointError(
                "is encrypted", where=str(path), hint="Unpack it with its password and give the file inside."
            )
        if record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                "has compressed records, which torch.save never writes",
                where=str(path),
                hint="Unpack it, and pack it again without compression: zip -0 -r clean.pth FOLDER.",
            )
        file.seek(record.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise damaged(path)
        names, extra = struct.unpack("<HH", header[26:30])
        return record.header_offset + 30 + names + extra, record.file_size

    order = f"{root}byteorder"
    if order in records:
        start, _ = content(order)
        file.seek(start)
        if file.read(6) != b"little":
            raise CheckpointError("was written by a big-endian machine", where=str(path), hint="Save it again on x86.")
    start, size = content(pickles[0])
    if size > MAX_BYTES:
        raise TooLarge(f"{size:,} bytes beside the weights")
    file.seek(start)
    value = unpickle(io.BytesIO(file.read(size)))
    return _tensors(value, Mapped(path, file), lambda storage: content(f"{root}data/{storage.key}"))


def _from_legacy(path: Path, file: BinaryIO) -> Any:
    head = file.read(2 * MAX_BYTES)
    stream = io.BytesIO(head)
    if unpickle(stream) != _LEGACY_MAGIC:
        protocol = head[1] if head[:1] == b"\x80" else 0
        raise CheckpointError(
            f"is a Python pickle of protocol {protocol} that torch.save did not write",
            where=str(path),
            hint="If you trust the file, write a clean copy: "
            "torch.save({'model': pickle.load(open(FILE, 'rb'))}, 'clean.pth').",
        )
    if unpickle(stream) != _LEGACY_VERSION or unpickle(stream).get("little_endian") is not True:
        raise CheckpointError("is of another version of the old format of torch.save", where=str(path))
    value = unpickle(stream)
    keys = unpickle(stream)
    mapped = Mapped(path, file)
    named: dict[str, Storage] = {}
    _walk(value, lambda tensor: named.setdefault(tensor.storage.key, tensor.storage))
    places: dict[str, tuple[int, int]] = {}
    offset = stream.tell()
    for key in map(str, keys):
        storage = named.get(key)
        count = int.from_bytes(bytes(mapped.values(offset, 8, torch.uint8).tolist()), "little")
        if storage is None or storage.dtype is None or count != storage.count:
            raise damaged(path)
        size = count * torch.empty((), dtype=storage.dtype).element_size()
        places[key] = (offset + 8, size)
        offset += 8 + size
    return _tensors(value, mapped, lambda storage: places[storage.key])


def _from_safetensors(path: Path, file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, Any]]:
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_BYTES:
        raise TooLarge(f"a header of {length:,} bytes")
    header = json.loads(file.read(length).decode())
    mapped = Mapped(path, file)
    metadata = header.pop("__metadata__", {})
    tensors: dict[str, Tensor] = {}
    used = 0
    for name, entry in header.items():
        dtype, shape, (start, stop) = _SAFETENSORS_DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if dtype is None:
            raise CheckpointError(
                f"has the weight {shown(name)} in the type {shown(str(entry['dtype']))}, which is not read",
                where=str(path),
                hint="Save it in float32 or float16.",
            )
        numbers = (start, stop, *shape)
        if len(shape) > MAX_DIMENSIONS or not all(type(each) is int and 0 <= each < 1 << 48 for each in numbers):
            raise damaged(path)
        count = math.prod(shape)
        used += stop - start
        if count * torch.empty((), dtype=dtype).element_size() != stop - start or used > len(mapped):
            raise damaged(path)
        tensors[name] = mapped.values(8 + length + start, count, dtype).view(shape)
    return tensors, metadata if isinstance(metadata, dict) else {}


def _tensors(value: Any, mapped: Mapped, place: Place) -> Any:
    """`value` with a tensor for each StoredTensor in its dicts: of containers and state dicts, three deep."""

    def made(stored: StoredTensor) -> Tensor | OtherTensor:
        start, size = place(stored.storage)
        width = torch.empty((), dtype=stored.dtype).element_size()
        count = stored.storage.count if stored.storage.dtype is not None else stored.storage.count // width
        if count * width > size:
            raise ValueError("a storage longer than its record")
        whole = Storage(stored.storage.key, stored.dtype, count)
        if not fits(StoredTensor(whole, stored.dtype, stored.offset, stored.size, stored.stride)):
            return OtherTensor("tensor of more values than are stored")
        values = mapped.values(start, count, stored.dtype)
        return values[stored.offset :].as_strided(stored.size, stored.stride)

    def convert(inner: Any, depth: int) -> Any:
        if isinstance(inner, StoredTensor):
            return made(inner)
        if isinstance(inner, Mapping) and depth < 3:
            return {key: convert(each, depth + 1) for key, each in inner.items()}
        return inner

    return convert(value, 0)


def _walk(value: Any, visit: Callable[[StoredTensor], object]) -> None:
    """Call `visit` with every tensor in nested dicts, lists and tuples; what is shared is entered once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, StoredTensor):
            visit(each)
        elif isinstance(each, dict | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            waiting.extend(each.values() if isinstance(each, dict) else each)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """Why the pickle or header in a file could not be read. Nearly anything is raised by one that is damaged."""
    if isinstance(error, ForeignGlobal):
        return CheckpointError(
            f"holds more than weights: it refers to `{shown(error.name)}`, and reading that could run code",
            where=str(path),
            hint="If you trust the file, write a clean copy where it was made: "
            "c = torch.load(FILE, weights_only=False); torch.save({'model': c['model']}, 'clean.pth') "
            "(for a whole model: torch.save(c.state_dict(), 'clean.pth')).",
        )
    if isinstance(error, TooLarge):
        return CheckpointError(
            f"holds far more than weights: {error}",
            where=str(path),
            hint="Save its weights alone: torch.save({'model': weights}, 'clean.pth').",
        )
    return damaged(path)


HIGHEST_PROTOCOL = 5  # of pickles that any Python writes


def protocol_of(head: bytes) -> int | None:
    """The protocol that a pickle says it is of; None if these bytes start none."""
    if len(head) < 2 or head[0] != 0x80 or head[1] > HIGHEST_PROTOCOL:
        return None
    return head[1]
