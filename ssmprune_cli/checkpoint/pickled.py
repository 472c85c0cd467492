"""A pickle as plain values: a small machine for its opcodes that imports nothing, calls nothing and bounds its work.

What `torch.save` and training scripts write comes back as dicts, lists, numbers, text and `StoredTensor`s, which say
where a tensor's bytes are. A reference to any other class or function is refused by name.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MAX_BYTES = 1 << 24  # of one pickle
MAX_OPCODES = 2_000_000
MAX_DIMENSIONS = 8

DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
_CONSTANTS_OF_TORCH = {
    f"torch.{name}"
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype | torch.layout | torch.qscheme | torch.memory_format)
}
_NAMED_DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}

# Classes that are read as the dict of their attributes, and those that are dicts themselves.
_NAMESPACES = {"argparse.Namespace", "types.SimpleNamespace"}
_DICTS = {
    "builtins.dict",
    "collections.OrderedDict",
    "collections.Counter",
    "collections.defaultdict",
    "yacs.config.CfgNode",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
}
_PATHS = {
    f"{module}.{kind}"
    for module in ("pathlib", "pathlib._local")
    for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
}
_SEQUENCES = {"builtins.set", "builtins.frozenset", "builtins.list", "builtins.tuple", "torch.Size"}
_PLAIN = {"builtins.int", "builtins.float", "builtins.bool", "builtins.str", "builtins.object", "builtins.complex"}
_ARRAYS = {"numpy.ndarray", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
_SCALARS = {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
# What mmengine keeps of a training's log. Such an object and its methods stand for nothing here.
_HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
_HISTORY_METHODS = {f"{_HISTORY}.{name}" for name in ("min", "max", "current", "mean")}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_TENSOR_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}


class ForeignGlobal(Exception):
    """The pickle refers to a class or function that is not read: `name`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class TooLarge(Exception):
    """The pickle is longer than any of a checkpoint."""


@dataclass(frozen=True)
class Storage:
    """Where tensors keep their values: `key` names the record; `dtype` is None for bytes, which a tensor then types."""

    key: str
    dtype: torch.dtype | None
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A strided tensor over a storage. Sizes are as the file has them, and not checked."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class OtherTensor:
    """A tensor of a kind that no weight has here: sparse, quantised, nested, without values, an array."""

    kind: str


@dataclass(frozen=True)
class _Global:
    """A name that the pickle refers to. It stands for itself until it is called."""

    name: str


class _Namespace(dict[Any, Any]):
    """Attributes of an object, which come with its BUILD."""


@dataclass(frozen=True)
class _Inert:
    """An object that is known, of no use here, and left as it is."""


@dataclass(frozen=True)
class _Scalar:
    """numpy's dtype of a scalar, such as "f8"."""

    code: str


def unpickle(content: io.BytesIO) -> Any:
    """The value of the pickle that starts where `content` stands, which is after it then.

    Raises ForeignGlobal, TooLarge, and ValueError and others for what is no pickle.
    """
    return _Machine().run(content)


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0  # bytes or so that calls made from what they were given: the memo gives it again and again

    def _account(self, value: Any) -> None:
        """Raises TooLarge when all that is copied is more than the pickle itself could hold."""
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, str | bytes):
                self.copied += len(each)
            elif isinstance(each, list | dict | tuple):
                self.copied += 16 * len(each)
        self.copied += 16 * len(value) if isinstance(value, tuple) else 0
        if self.copied > 4 * MAX_BYTES:
            raise TooLarge("more than its own length is copied")

    def _called(self, what: Any, arguments: Any) -> None:
        self._account(arguments)
        self.stack.append(_call(what, arguments))

    def run(self, content: io.BytesIO) -> Any:
        argument: Any
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count > MAX_OPCODES:
                raise TooLarge(f"more than {MAX_OPCODES:,} operations")
            name = opcode.name
            if name in _PUSHED:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                make = _CONSTANTS[name]
                self.stack.append(make())
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                self.memo[argument] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                self.stack.append(self.memo[argument])
            elif name == "STOP":
                return self.stack.pop()
            elif name not in ("PROTO", "FRAME"):
                getattr(self, f"_{name.lower()}")(argument)
        raise ValueError("the pickle has no end")

    def _marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self._marked()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._marked()))

    def _tuple1(self, _: Any) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def _tuple2(self, _: Any) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self, _: Any) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _list(self, _: Any) -> None:
        self.stack.append(self._marked())

    def _dict(self, _: Any) -> None:
        items = self._marked()
        self.stack.append({})
        self._set(items)

    def _frozenset(self, _: Any) -> None:
        self.stack.append(self._marked())

    def _append(self, _: Any) -> None:
        value = self.stack.pop()
        self._extend([value])

    def _appends(self, _: Any) -> None:
        self._extend(self._marked())

    def _additems(self, _: Any) -> None:
        self._extend(self._marked())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("items for what is no list")
        target.extend(items)

    def _setitem(self, _: Any) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._set([key, value])

    def _setitems(self, _: Any) -> None:
        self._set(self._marked())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("keys for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(_known(f"{module}.{name}"))

    def _stack_global(self, _: Any) -> None:
        name = self.stack.pop()
        module = self.stack.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a reference without a name")
        self.stack.append(_known(f"{module}.{name}"))

    def _binpersid(self, _: Any) -> None:
        self.stack.append(_storage(self.stack.pop()))

    def _reduce(self, _: Any) -> None:
        arguments = self.stack.pop()
        self._called(self.stack.pop(), arguments)

    def _newobj(self, _: Any) -> None:
        self._reduce(None)

    def _newobj_ex(self, _: Any) -> None:
        self.stack.pop()
        self._reduce(None)

    def _obj(self, _: Any) -> None:
        kind, *arguments = self._marked()
        self._called(kind, tuple(arguments))

    def _inst(self, argument: str) -> None:
        self._global(argument)
        kind = self.stack.pop()
        self._called(kind, tuple(self._marked()))

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _Namespace):
            self._account(state)
            for each in state if isinstance(state, tuple) else (state,):
                if isinstance(each, dict):
                    target.update(each)

    def __getattr__(self, name: str) -> Any:
        raise ValueError(f"the operation {name[1:].upper()} is not read")


_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}


def _key(key: Any) -> Any:
    """A key of a dict. Only plain ones: to hash a deeply nested tuple could end the process."""
    flat = key if isinstance(key, tuple) and len(key) <= 8 else (key,)
    if not all(each is None or isinstance(each, str | int | float | bytes) for each in flat):
        raise ValueError("a key that is not plain")
    return key


def _known(name: str) -> Any:
    """What `name` stands for. Raises ForeignGlobal for a class or function that is not read."""
    if len(name) > 200:
        raise ForeignGlobal(name)
    name = re.sub(r"^__builtin__\.", "builtins.", name)
    module, _, last = name.rpartition(".")
    if name in _CONSTANTS_OF_TORCH:
        return name
    if name in _HISTORY_METHODS:
        return _Inert()
    is_storage = last.endswith("Storage") and module in ("torch", "torch.cuda", "torch.storage")
    is_tensor = module in ("torch._utils", "torch._tensor") and last.startswith("_rebuild_")
    if is_storage or is_tensor or name in _CALLED or name in _PLAIN or name in _TENSOR_TYPES:
        return _Global(name)
    raise ForeignGlobal(name)


def _call(what: Any, arguments: Any) -> Any:
    """What calling `what` would give."""
    if not isinstance(what, _Global) or not isinstance(arguments, tuple):
        raise ValueError("a call of what is no class or function")
    name = what.name
    if name in _CALLED:
        return _CALLED[name](*arguments)
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        return _tensor(*arguments[:4])
    if name == "torch._utils._rebuild_tensor_v3":
        return _tensor(*arguments[:4], dtype=_NAMED_DTYPES.get(arguments[6]))
    if name in _PARAMETERS:
        return arguments[0]
    if name == "torch._tensor._rebuild_from_type_v2":
        return _call(arguments[0], arguments[2])
    return OtherTensor(name.rpartition(".")[2].removeprefix("_rebuild_").replace("_", " "))


def _storage(identity: Any) -> Storage:
    kind, dtype, key, _, count, *view = identity
    if kind != "storage" or not isinstance(dtype, _Global) or not isinstance(key, str | int) or any(view):
        raise ValueError("a storage of an unknown kind")
    if not isinstance(count, int) or not 0 <= count < 1 << 48:
        raise ValueError("a storage of an impossible length")
    return Storage(str(key), DTYPES.get(dtype.name.rpartition(".")[2].removesuffix("Storage")), count)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *, dtype: torch.dtype | None = None
) -> StoredTensor | OtherTensor:
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor without storage, size or stride")
    dtype = dtype or storage.dtype
    if dtype is None:
        return OtherTensor("tensor of quantised or unknown type")
    numbers = (offset, *size, *stride)
    if not all(isinstance(each, int) and 0 <= each < 1 << 48 for each in numbers) or len(size) != len(stride):
        raise ValueError("a tensor of impossible sizes")
    return StoredTensor(storage, dtype, offset, size, stride)


def _scalar(dtype: Any, content: Any) -> Any:
    """numpy's scalar, as a number of Python."""
    code = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "b1": "?"}
    code |= {"u8": "Q", "u4": "I", "u2": "H", "u1": "B"}
    if isinstance(dtype, _Scalar) and dtype.code in code and isinstance(content, bytes):
        (value,) = struct.unpack(f"<{code[dtype.code]}", content)
        return value
    return OtherTensor("numpy scalar")


def _dtype(code: Any, *_: Any) -> _Scalar:
    return _Scalar(code.lstrip("<|=") if isinstance(code, str) else "")


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes, as pickles of protocol 2 have them: text and the name of its encoding."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes in an unknown encoding")
    return text.encode("latin1")


def _pairs(*arguments: Any) -> dict[Any, Any]:
    """A dict from nothing, a dict, a list of pairs, or the factory of a defaultdict."""
    source = arguments[0] if arguments and not isinstance(arguments[0], _Global | None) else {}
    items = list(source.items()) if isinstance(source, dict) else list(source)
    return {_key(key): value for key, value in items}


def _path(*steps: Any) -> str:
    if not all(isinstance(each, str) for each in steps):
        raise ValueError("a path of what is no text")
    return "/".join(steps)


def _items(*arguments: Any) -> Any:
    items = arguments[0] if arguments else ()
    return items if isinstance(items, tuple) else list(items)


def _attribute(owner: Any, name: Any) -> _Inert:
    """The methods that a HistoryBuffer holds, as pickles of protocol 2 have them. Nothing else has attributes."""
    full = f"{owner.name}.{name}" if isinstance(owner, _Global) else f"{type(owner).__name__}.{name}"
    if not isinstance(owner, _Global) or full not in _HISTORY_METHODS:
        raise ForeignGlobal(f"getattr of {full}")
    return _Inert()


def _instance(kind: Any, *_: Any) -> Any:
    """copyreg's way to make an object without calling its class."""
    return _call(kind, ())


_CALLED: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_NAMESPACES, lambda *_: _Namespace()),
    **dict.fromkeys(_DICTS, _pairs),
    **dict.fromkeys(_PATHS, _path),
    **dict.fromkeys(_SEQUENCES, _items),
    **dict.fromkeys(_SCALARS, _scalar),
    **dict.fromkeys(_ARRAYS, lambda *_: OtherTensor("numpy array")),
    "numpy.dtype": _dtype,
    _HISTORY: lambda *_: _Inert(),
    "builtins.getattr": _attribute,
    "_codecs.encode": _encode,
    "torch.device": lambda *parts: ":".join(map(str, parts[:2])),
    "torch.serialization._get_layout": lambda *_: OtherTensor("layout"),
    "copyreg._reconstructor": _instance,
    "copy_reg._reconstructor": _instance,
}


def fits(tensor: StoredTensor) -> bool:
    """Whether all values of `tensor` lie in its storage, and it has no more of them."""
    if len(tensor.size) > MAX_DIMENSIONS:
        return False
    if 0 in tensor.size:
        return True
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.size, tensor.stride, strict=True))
    return last < tensor.storage.count and math.prod(tensor.size) <= tensor.storage.count
