"""Files that mean harm or are of another kind: refused in little memory and time, and called what they are."""

from __future__ import annotations

import io
import json
import os
import pickle  # noqa: TID251 (to write what must not be read)
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ssmprune_cli.checkpoint import load, read, sha256
from ssmprune_cli.errors import CheckpointError, shown
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.preprocessing import Preprocessing

CONFIG = VimConfig(image_size=(32, 32), patch_size=8, stride=8, embed_dim=16, depth=2, num_classes=3)
ARGS = {"model": "vim_midclstok_div2", "input_size": 32, "eval_crop_ratio": 1.0}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return Vim(CONFIG).state_dict()


def write(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def zipped(path: Path, data: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        for name, content in records.items():
            archive.writestr(f"a/{name}", content)
    return path


# --- containers


CONTAINERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "Lightning": lambda state: {
        "state_dict": {f"model.{key}": value for key, value in state.items()},
        "hyper_parameters": ARGS,
        "pytorch-lightning_version": "2.4",
    },
    "compiled Lightning": lambda state: {
        "state_dict": {f"model._orig_mod.{key}": value for key, value in state.items()}
    },
    "backbone": lambda state: {"state_dict": {f"backbone.{key}": value for key, value in state.items()}},
    "net": lambda state: {"net": state, "acc": 91.5, "epoch": 3},
    "params": lambda state: {"params": state},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "DeepSpeed": lambda state: {"module": state, "ds_config": {}, "ds_version": "0.15"},
    "nested": lambda state: {"model": {"state_dict": state}},
    "thop": lambda state: {**state, "total_ops": torch.zeros(1), "layers.0.total_params": torch.zeros(1)},
    "parameters": lambda state: {"model": {key: torch.nn.Parameter(value) for key, value in state.items()}},
    "shared views": lambda state: {"model": {**state, "head.bias": torch.zeros(9)[3:6]}},
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("protocol", [2, 5])
def test_containers_of_many_codes(tmp_path: Path, state: dict[str, Tensor], name: str, protocol: int) -> None:
    path = write(tmp_path / "vim.pth", CONTAINERS[name](state), pickle_protocol=protocol)
    loaded = load(path, image_size=32).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items() if name != "shared views")


def test_numbers_of_numpy_and_paths_stand_beside_the_weights(tmp_path: Path, state: dict[str, Tensor]) -> None:
    np = pytest.importorskip("numpy")
    args = {**ARGS, "eval_crop_ratio": np.float64(1.0), "input_size": np.int64(32), "output": tmp_path}
    content = {"model": state, "best": np.float32(91.5), "args": args, "history": np.zeros(3)}
    found = read(write(tmp_path / "vim.pth", content))
    assert (found.hints.eval_crop_ratio, found.hints.image_size) == (1.0, 32)


def test_several_sets_of_weights_are_a_choice(tmp_path: Path, state: dict[str, Tensor]) -> None:
    other = {key: value + 1 for key, value in state.items()}
    path = write(tmp_path / "vim.pth", {"net": state, "params": other})
    with pytest.raises(CheckpointError, match=r"several sets of weights: net, params\nType `--weights net` or"):
        load(path, image_size=32)
    assert torch.equal(load(path, image_size=32, weights="params").state_dict()["cls_token"], other["cls_token"])


def test_sharded_checkpoints_and_folders_of_transformers(tmp_path: Path, state: dict[str, Tensor]) -> None:
    names = sorted(state)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: state[key] for key in keys}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, keys in halves.items() for key in keys}}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vim", **ARGS}))
    assert load(index, family="vim", image_size=32).config.depth == 2
    folder = load(tmp_path)
    assert (
        isinstance(folder.preprocessing, Preprocessing) and folder.preprocessing.resize == 32
    )  # its config.json is read
    assert all(torch.equal(value, state[key]) for key, value in folder.state_dict().items())
    before = sha256(tmp_path)
    save_file({key: state[key] + 1 for key in halves["two.safetensors"]}, tmp_path / "two.safetensors")
    assert sha256(tmp_path) != before
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors: there is no such file"):
        load(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        load(tmp_path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path)


def test_home_folders_and_addresses(tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "vim.pth", {"model": state, "args": ARGS})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/vim.pth").config.depth == 2
    assert sha256(Path("~/vim.pth")) == sha256(tmp_path / "vim.pth")
    for address, hint in (
        ("https://example.org/vim.pth", "Download the file first"),
        ("https://huggingface.co/a/b/resolve/main/vim.pth", "Type hf://a/b/vim.pth."),
    ):
        with pytest.raises(CheckpointError, match=rf"is an address, and ssmprune downloads from the hub only\n{hint}"):
            load(address)


# --- what is not a regular file, or of another kind


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path / "link", "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(CheckpointError, match=f"is {kind}, not a file"):
            load(path)
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is a pipe"):
        load(tmp_path / "out")
    with pytest.raises(CheckpointError, match="null"):
        load("a\0b")


class Odd:
    """A class that no checkpoint needs."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda state: pickle.dumps({"a": [1, 2]}, protocol=4),
            r"a Python pickle of protocol 4 that torch\.save did not",
        ),
        (lambda state: b"\x80\x09" + bytes(50), "is a pickle of protocol 9"),
        (lambda state: b"GGUF" + bytes(50), "a GGUF file of a language model"),
        (lambda state: b"\x93NUMPY\x01\x00", "is one array of numpy"),
        (lambda state: b"\x28\xb5\x2f\xfd" + bytes(50), "is a packed archive"),
    ],
)
def test_whole_files_of_other_kinds_are_not_called_damaged(
    tmp_path: Path, state: dict[str, Tensor], make: Callable[[Any], bytes], message: str
) -> None:
    path = tmp_path / "vim.pth"
    path.write_bytes(make(state))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert caught.value.hint and "damaged" not in caught.value.what


@pytest.mark.parametrize(
    ("flag", "compression", "message"),
    [(0, zipfile.ZIP_DEFLATED, "has compressed records"), (1, zipfile.ZIP_STORED, "is encrypted")],
)
def test_zips_that_torch_does_not_write(
    tmp_path: Path, state: dict[str, Tensor], flag: int, compression: int, message: str
) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = tmp_path / "vim.pth"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    if flag:
        data = bytearray(path.read_bytes())
        place = data.find(b"PK\x01\x02")
        while place >= 0:
            data[place + 8] |= 1
            place = data.find(b"PK\x01\x02", place + 4)
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load(path)


# --- bombs


def test_tensors_that_are_no_weights_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised and CSR tensors
        csr = torch.eye(3).to_sparse_csr()
        quantised = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
    odd = {
        "sparse": torch.eye(3).to_sparse(),
        "sparse ": csr,
        "qtensor": quantised,
        "meta": torch.zeros(3, device="meta"),
        "more values than are stored": torch.zeros(1).expand(1 << 40),
    }
    for kind, value in odd.items():
        path = write(tmp_path / "vim.pth", {"model": {**state, "head.bias": value}})
        with pytest.raises(CheckpointError, match=rf"has the weight head\.bias as a .*{kind.strip()}"):
            load(path)
    shared = torch.zeros(1 << 16)
    many = {f"layers.{index}.x": shared for index in range(100)}
    with pytest.raises(CheckpointError, match="share their values: together they are larger than the file"):
        load(write(tmp_path / "vim.pth", many))


def long_pickle(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


BOMBS = {
    "longer than any": long_pickle(b"N" * (1 << 25)),
    "too many operations": long_pickle(b"N" * 3_000_000),
    "a place in the memo that would need gigabytes": long_pickle(b"]r\xff\xff\xff\xff"),
    "text of exabytes": long_pickle(b"\x8d" + struct.pack("<Q", 1 << 62) + b"x"),
    "a key that is a tuple in a tuple": long_pickle(b"})" + b"\x85" * 500_000 + b"Ns"),
    "copies": long_pickle(
        b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x00"
        b"c_codecs\nencode\nq\x01" + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 10_000
    ),
    "bytearray": long_pickle(b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R"),
    "a dict in a dict": long_pickle(b"}" + b"X\x01\x00\x00\x00a}" * 300_000 + b"s" * 300_000),
}
ONE_BY_ONE = """
import resource, sys, time
import ssmprune_cli
import ssmprune_cli.checkpoint
from ssmprune_cli.errors import CheckpointError
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
for path in sys.argv[1:]:
    try:
        ssmprune_cli.load(path)
    except CheckpointError as error:
        print("refused", error.what)
"""


def test_pickles_that_would_fill_the_memory(tmp_path: Path) -> None:
    paths = [zipped(tmp_path / f"{name}.pth", data) for name, data in BOMBS.items()]
    command = [sys.executable, "-c", ONE_BY_ONE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.count("refused") == len(BOMBS), (done.stdout, done.stderr[-2000:])


def test_numbers_and_names_beyond_reason(tmp_path: Path, state: dict[str, Tensor]) -> None:
    far = {**state, "layers.1000000000.norm.weight": torch.zeros(16)}
    with pytest.raises(CheckpointError, match="not numbered from 0 on: of 3, number 2 is missing"):
        load(write(tmp_path / "vim.pth", far), image_size=32)
    name = "x" * 1_000_000
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path / "vim.pth", {**state, name: torch.zeros(1)}), image_size=32)
    assert "999,840 more characters" in str(caught.value) and len(str(caught.value)) < 2000
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path / "vim.pth", {**state, "\x1b[2J\x07\n": torch.zeros(1)}), image_size=32)
    assert r"\x1b[2J\x07\n is unknown" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"without values: head\.bias"):
        load(write(tmp_path / "vim.pth", {**state, "head.bias": torch.zeros(0)}), image_size=32)


def test_what_is_shown_is_short_and_plain() -> None:
    assert shown("a\x00b\x1b[1m\ud800é") == r"a\x00b\x1b[1m\ud800é"
    assert shown("x" * 200) == "x" * 160 + "... (40 more characters)"
    assert shown("a\nb", lines=True) == "a\nb" and shown("a\nb") == r"a\nb"


def test_names_that_are_no_text_are_read(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / os.fsdecode(b"vim_\xff.pth")
    write(tmp_path / "x.pth", {"model": state, "args": ARGS}).rename(path)
    assert load(path).config.depth == 2
    save_file(state, tmp_path / "y")
    (tmp_path / "y").rename(path)
    assert load(path, image_size=32).config.depth == 2
    with pytest.raises(CheckpointError, match=r"vim_\\udcff\.pth: holds one set"):
        load(path, weights="model_ema")
