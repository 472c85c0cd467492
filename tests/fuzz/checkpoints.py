"""Checkpoints, artefact folders and recipes, broken in ways that matter to their parsers.

Each case is a function of a seed, so that a number in a report makes the same file again.
"""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize

from ssmprune_cli.checkpoint import load, save
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.pruning import compress
from ssmprune_cli.recipe import load_recipe

SMALL = {"image_size": [32, 32], "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 3, "num_classes": 3}
WORDS = [
    "",
    "weight",
    "layers.0",
    "cls_token",
    "\x00",
    "\u202e",
    "é" * 50,
    "x" * 100_000,
    "args",
    "pos_embed",
    "\ud800",
]
NUMBERS: list[Any] = [0, -1, 1, 7, 255, 2**31, 2**63, -(2**63), 10**30, 1e308, -0.0, 0.5]
YAML_PARTS = [
    "!!python/object:os.system ",
    "&a ",
    "*a",
    "[[[[",
    "{",
    ": ",
    "\n- ",
    "\t",
    "!!binary x",
    "!!bool x",
    "!!timestamp x",
    "!!int ",
    "!!float x",
    "!!set {",
    "!!omap ",
    "? ",
    "|\n",
    "%YAML 3\n",
    "\x00",
]


class Seeds:
    """The healthy files that are mutated."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        family = FAMILIES.get("vim")
        model = family.build(family.config_class(**SMALL)).eval()
        self.state = model.state_dict()
        container = {
            "model": self.state,
            "epoch": 3,
            "args": {"model": "vim_midclstok_div2", "input_size": 32, "eval_crop_ratio": 1.0, "lr": [0.1, 0.2]},
        }
        self.zip, self.legacy = (_saved(container, new) for new in (True, False))
        self.safetensors = serialize(self.state, metadata={"format": "pt"})
        compress(model, 0.6, alignment="null")
        save(folder / "artefact", model)
        self.config = (folder / "artefact" / "config.json").read_text(encoding="utf-8")
        self.weights = (folder / "artefact" / "model.safetensors").read_bytes()
        self.recipe = (
            "format: 1\npruning:\n  points: [1, 2]\n  keep: 0.6\n  importance: clip\ncalibration:\n  images: 64\n"
        )


def _saved(content: Any, new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def flipped(content: bytes, random: random.Random) -> bytes:
    """A few bytes changed, cut, doubled or moved; half of the time near the start, where headers are."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 1, 2, 3, 8])):
        reach = len(data) if random.random() < 0.5 else min(len(data), 2000)
        place = random.randrange(max(reach, 1))
        kind = random.choice([0, 0, 0, 1, 2, 3, 3, 4, 4, 5])
        if kind == 0:
            data[place : place + 1] = bytes([random.randrange(256)])
        elif kind == 1:
            del data[place : place + random.randint(1, 64)]
        elif kind == 2:
            data[place:place] = data[place : place + random.randint(1, 64)]
        elif kind == 3:
            data[place : place + 8] = struct.pack(
                "<Q", random.choice([0, 1, 2**16, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
            )
        elif kind == 4:
            data[place : place + 4] = random.randbytes(4)
        else:
            del data[place:]
        if not data:
            return b""
    return bytes(data)


def repacked(content: bytes, random: random.Random) -> bytes:
    """A checkpoint's zip with records changed, renamed, lost, doubled or compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                data = repickled(data, random)
            if random.random() < 0.02:
                data = flipped(data, random)
            if random.random() < 0.01:
                continue
            squeeze = random.random() < 0.01
            target.writestr(name, data, zipfile.ZIP_DEFLATED if squeeze else zipfile.ZIP_STORED)
    return buffer.getvalue()


def repickled(content: bytes, random: random.Random) -> bytes:
    """A pickle with some of its operations lost, doubled, or replaced by others; their arguments by hostile ones."""
    operations = [(opcode, position) for opcode, _, position in pickletools.genops(content)]
    ends = [*(position for _, position in operations[1:]), len(content)]
    parts = [content[position:end] for (_, position), end in zip(operations, ends, strict=True)]
    for _ in range(random.choice([1, 1, 2, 6])):
        place = random.randrange(len(parts))
        kind = random.choice([0, 1, 2, 3, 3, 4, 4, 4])
        if kind == 0:
            parts[place] = b""
        elif kind == 1:
            parts[place] *= random.choice([2, 3, 1000])
        elif kind == 2:
            parts[place] = random.choice(parts)
        elif kind == 3:
            parts[place] = random.choice(HOSTILE)
        else:
            number = random.choice([0, 1, -1, 3, 2**31 - 1, 2**40, 2**62, 2**100])
            width = (number.bit_length() + 8) // 8
            parts[place] = b"\x8a" + bytes([width]) + number.to_bytes(width, "little", signed=True)
    return b"".join(parts)


HOSTILE = [
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"cbuiltins\nbytearray\n",
    b"ctorch\nTensor\n",
    b"ctorch._utils\n_rebuild_sparse_tensor\n",
    b"ctorch._utils\n_rebuild_qtensor\n",
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"cargparse\nNamespace\n",
    b"c_codecs\nencode\n",
    b"r\xff\xff\xff\xff",  # LONG_BINPUT at a place that would need gigabytes
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",  # BINUNICODE8 of exabytes
    b"(" * 2000,
    b"\x85" * 5000,  # a tuple in a tuple in a tuple
    b"]" * 5000,
    b"\x82\x01",  # EXT1
    b"R",
    b"b",
    b"\x81",
    b"\x92",
    b"Q",
    b"2" * 3000,
]


def header(content: bytes, random: random.Random) -> bytes:
    """A safetensors file whose header says something else."""
    length = int.from_bytes(content[:8], "little")
    values = mutated(json.loads(content[8 : 8 + length]), random)
    text = json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def mutated(value: Any, random: random.Random) -> Any:
    """JSON values with a few of them changed for others of any type and size, or nested."""
    target = json.loads(json.dumps(value))
    for _ in range(random.choice([1, 1, 2, 4])):
        here = target
        while isinstance(here, dict | list) and here:
            deeper = [key for key in here if isinstance(here[key], dict)] if isinstance(here, dict) else []
            if deeper and random.random() < 0.7:
                here = here[random.choice(deeper)]
                continue
            key = random.choice(list(here)) if isinstance(here, dict) else random.randrange(len(here))
            if isinstance(here[key], dict | list) and here[key] and random.random() < 0.9:
                here = here[key]
                continue
            kind = random.randrange(6)
            if kind == 0:
                del here[key]
            elif kind == 1 and isinstance(here, dict):
                here[random.choice(WORDS)] = here.pop(key)
            else:
                here[key] = random.choice(
                    [*NUMBERS, *WORDS, None, True, [], {}, [1] * 1000, [[[[[]]]]], {"a": {"a": {}}}]
                )
            break
    return target


def text(content: str, random: random.Random) -> bytes:
    """Text with parts of YAML, JSON or garbage put in, lines moved and bytes changed."""
    parts = content.splitlines(keepends=True)
    for _ in range(random.choice([1, 1, 2, 4])):
        place = random.randrange(len(parts))
        kind = random.choice([0, 1, 2, 3, 3, 3, 4])
        if kind == 0:
            parts[place] = random.choice(YAML_PARTS) + parts[place]
        elif kind == 1:
            parts[place] = parts[place].rstrip("\n") + random.choice(YAML_PARTS) * random.choice([1, 50]) + "\n"
        elif kind == 2:
            parts[place] *= random.choice([2, 200])
        elif kind == 3:
            parts[place] = parts[place].replace(":", ": " + str(random.choice([*NUMBERS, *WORDS[:4]])))
        else:
            random.shuffle(parts)
    data = "".join(parts).encode("utf-8", "replace")
    return flipped(data, random) if random.random() < 0.3 else data


Case = tuple[str, Callable[[Seeds, random.Random, Path], object]]


def _file(name: str, make: Callable[[Seeds, random.Random], bytes]) -> Case:
    def run(seeds: Seeds, random: random.Random, folder: Path) -> object:
        path = folder / "vim.pth"
        path.write_bytes(make(seeds, random))
        return load(path, family="vim", image_size=32)

    return name, run


def _artefact(seeds: Seeds, random: random.Random, folder: Path) -> object:
    out = folder / "out"
    out.mkdir(exist_ok=True)
    values = json.loads(seeds.config)
    content = text(seeds.config, random) if random.random() < 0.3 else json.dumps(mutated(values, random)).encode()
    (out / "config.json").write_bytes(content)
    weights = seeds.weights if random.random() < 0.8 else flipped(seeds.weights, random)
    (out / "model.safetensors").write_bytes(weights)
    return load(out, family="vim")


def _recipe(seeds: Seeds, random: random.Random, folder: Path) -> object:
    path = folder / "recipe.yaml"
    path.write_bytes(text(seeds.recipe, random))
    return load_recipe(path)


CASES: list[Case] = [
    _file("zip, bytes", lambda seeds, random: flipped(seeds.zip, random)),
    _file("zip, records", lambda seeds, random: repacked(seeds.zip, random)),
    _file("legacy, bytes", lambda seeds, random: flipped(seeds.legacy, random)),
    _file("safetensors, bytes", lambda seeds, random: flipped(seeds.safetensors, random)),
    _file("safetensors, header", lambda seeds, random: header(seeds.safetensors, random)),
    ("artefact", _artefact),
    ("recipe", _recipe),
]
