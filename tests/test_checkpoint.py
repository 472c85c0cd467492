"""Reading and writing checkpoints: containers, overrides, refusals, artefact folders, resizing."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssmprune_cli import checkpoint
from ssmprune_cli.checkpoint import load, read, replacing, save
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models.common.backbone import Backbone
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.preprocessing import Reading
from ssmprune_cli.pruning import compress
from ssmprune_cli.workflows.compress import CompressRequest, compress_checkpoint
from ssmprune_cli.workflows.reporting import figures
from ssmprune_cli.workflows.source import Source

GOLDEN = Path(__file__).parent / "golden"
VIM_LIKE = GOLDEN / "containers" / "vim_like.pth"
MIDDLE = GOLDEN / "vim_mini_midcls"
CONFIG = VimConfig(image_size=(32, 32), patch_size=8, stride=8, embed_dim=16, depth=4, num_classes=3)


class Opaque:
    """Something that a pickle may refer to and that must not be loaded."""


def make(config: VimConfig = CONFIG) -> Vim:
    torch.manual_seed(0)
    return Vim(config).eval()


@pytest.fixture
def model() -> Vim:
    return make()


def opened(path: Path, **options: Any) -> Backbone:
    """`path` loaded, where nothing in the file says what images it is for."""
    return load(path, **{"image_size": 32, **options})


def write(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def same_weights(first: Backbone, second: Backbone) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- what is read


def test_published_container_gives_the_golden_logits() -> None:
    """The container holds the weights of vim_mini_midcls, and args, an optimiser and a moving average beside them."""
    expected = load_file(MIDDLE / "io.safetensors")
    found = checkpoint.read(VIM_LIKE)
    assert (found.kind, found.used) == ("torch", "model")
    assert found.entries == ("model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args")
    model = load(VIM_LIKE)
    assert not model.training and model.config == VimConfig((64, 64), 8, 8, embed_dim=48, depth=4, num_classes=10)
    with torch.no_grad():  # measured 2e-6
        torch.testing.assert_close(model(expected["input"]), expected["logits"], rtol=0, atol=1e-4)


def test_either_copy_of_the_weights_is_taken(tmp_path: Path, model: Vim) -> None:
    average = {key: value + 1 for key, value in model.state_dict().items()}
    path = write(tmp_path / "vim_both.pth", {"model": model.state_dict(), "model_ema": average, "epoch": 1})
    assert same_weights(opened(path), model)
    assert torch.equal(opened(path, weights="model_ema").state_dict()["cls_token"], average["cls_token"])
    alone = write(tmp_path / "vim_one.pth", {"model": model.state_dict()})
    with pytest.raises(CheckpointError, match="has no model_ema weights, only model"):
        load(alone, weights="model_ema")
    with pytest.raises(CheckpointError, match="holds one set of weights"):
        load(write(tmp_path / "bare.pth", model.state_dict()), weights="model_ema")
    with pytest.raises(UsageError, match="unknown weights 'ema'"):
        load(alone, weights="ema")


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: OrderedDict(state),
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": prefixed(state), "args": argparse.Namespace(lr=0.1)},
        lambda state: prefixed({f"_orig_mod.{key}": value for key, value in state.items()}),
        lambda state: {"model": state, "args": {"input_size": 32}},
    ],
    ids=["bare", "ordered", "model", "state_dict", "module. and args", "compiled", "args as a dict"],
)
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_containers(tmp_path: Path, model: Vim, wrap: Callable[[Any], Any], new_format: bool) -> None:
    path = tmp_path / "vim.pth"
    torch.save(wrap(model.state_dict()), path, _use_new_zipfile_serialization=new_format)
    assert checkpoint.read(path).kind == ("torch" if new_format else "torch (legacy)")
    assert same_weights(opened(path), model)


def test_safetensors_whatever_the_name(tmp_path: Path, model: Vim) -> None:
    save_file(model.state_dict(), tmp_path / "vim.bin")
    assert same_weights(load(str(tmp_path / "vim.bin"), image_size=32), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path: Path, model: Vim, dtype: torch.dtype) -> None:
    path = write(tmp_path / "vim.pth", {key: value.to(dtype) for key, value in model.state_dict().items()})
    loaded = opened(path)
    for key, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[key].to(dtype).float())


def test_loaded_weights_do_not_hang_on_the_file(tmp_path: Path, model: Vim) -> None:
    """Files are mapped while they are read; the model must outlive a change of the file, and be trainable."""
    path = write(tmp_path / "vim.pth", model.state_dict())
    loaded = opened(path)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert same_weights(loaded, model)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in loaded.parameters())


def test_names_in_the_container_decide_what_shapes_cannot(tmp_path: Path, model: Vim) -> None:
    args = argparse.Namespace(model="vim_x_with_cls_token", input_size=32, eval_crop_ratio=1.0)
    config = load(write(tmp_path / "vim.pth", {"model": model.state_dict(), "args": args})).config
    assert config == replace(CONFIG, class_token="head", divide_out=False, eval_crop_ratio=1.0)


# --- overrides


def test_family_and_variant_override(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = Vim(VimConfig()).state_dict()
    state = {key: torch.zeros(value.shape) for key, value in shapes.items()}
    path = write(tmp_path / "videomamba_t16_in1k_res224.pth", state)
    assert load(path, family="vim").config == VimConfig()
    assert load(path, variant="vim_tiny").config == VimConfig()
    with pytest.raises(CheckpointError, match=r"do not fit vim_small: .*cls_token has shape.*, and \d+ more"):
        load(path, variant="vim_small")
    with pytest.raises(CheckpointError, match=r"rope\.freqs_cos is missing, rope\.freqs_sin is missing$"):
        load_message(path, variant="vim_tiny_73p1")


def test_a_name_that_the_keys_contradict(tmp_path: Path) -> None:
    state = make(replace(CONFIG, class_token="none")).state_dict()
    path = write(tmp_path / "videomamba.pth", state)
    with pytest.raises(CheckpointError, match=r"weights of Vision Mamba \(Vim\), but its name says") as caught:
        load(path)
    assert caught.value.hint is not None and "--family vim" in caught.value.hint
    assert opened(path, family="vim").family == "vim"


def load_message(path: Path, **options: Any) -> None:
    """Load, and raise with the message only, so that a pattern can be anchored at its end."""
    try:
        load(path, **options)
    except CheckpointError as error:
        raise CheckpointError(error.what) from error


def test_unknown_overrides_name_the_known_ones() -> None:
    with pytest.raises(UsageError, match="Did you mean 'vim'") as family:
        load(VIM_LIKE, family="vimm")
    with pytest.raises(UsageError, match="Did you mean 'vim_tiny'") as variant:
        load(VIM_LIKE, variant="vim_tin")
    assert family.value.hint is not None and family.value.hint.startswith("Known: vim, ")
    assert variant.value.hint is not None
    assert "vim_tiny_73p1" in variant.value.hint


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("temporal_pos_embedding", "a VideoMamba for videos without its classifier"),
    ],
)
def test_other_families_are_recognised_and_refused(tmp_path: Path, key: str, name: str) -> None:
    path = write(tmp_path / "x.pth", {key: torch.zeros(2)})
    with pytest.raises(CheckpointError, match=rf"is {name}.*not supported\n.*Known families: vim.*weights: {key}"):
        load(path)
    with pytest.raises(CheckpointError, match=rf"head\.weight is missing\nIt looks like {name}"):
        load(path, family="vim")


def test_an_unknown_model_is_refused_with_its_first_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "resnet.pth", {f"layer{i}.weight": torch.zeros(2) for i in range(9)})
    with pytest.raises(CheckpointError, match=r"no known model family\n.*layer0\.weight, .*layer4\.weight, and 4 more"):
        load(path)


def test_a_mixture_of_families_is_refused_with_what_does_not_fit(tmp_path: Path, model: Vim) -> None:
    torch.manual_seed(0)
    vmamba = VMamba(VMambaConfig(image_size=(32, 32), embed_dim=16, depths=(1, 1), num_classes=3)).state_dict()
    state = {**model.state_dict(), **{key: value for key, value in vmamba.items() if "blocks" in key}}
    blocks = sum("blocks" in key for key in vmamba)
    message = (
        r"mixes .* Vision Mamba.* VMamba; what does not fit .*layers\.0\.blocks\.0\.\S+ is unknown, "
        rf".* and {blocks - 5} more\n.*Known families: vim, .*vmamba"
    )
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path / "vim.pth", state))
    one = {**vmamba, "layers.0.mixer.A_log": torch.zeros(1)}  # too little for Vim: what is left over is named
    message = r"do not fit VMamba: layers\.0\.mixer\.A_log is unknown\n.*Known families: vim, .*vmamba"
    with pytest.raises(CheckpointError, match=message):
        opened(write(tmp_path / "one.pth", one))


def test_a_yacs_configuration_is_read_as_plain_settings(
    tmp_path: Path, model: Vim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VMamba's training code stores one. yacs is not installed: its class is stood in for while writing."""

    class CfgNode(dict[str, Any]):
        def __init__(self, **values: Any) -> None:
            super().__init__(values)
            self.__dict__["__immutable__"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    stand_in = types.ModuleType("yacs.config")
    stand_in.CfgNode = CfgNode  # type: ignore[attr-defined]
    for name, module in (("yacs", types.ModuleType("yacs")), ("yacs.config", stand_in)):
        monkeypatch.setitem(sys.modules, name, module)
    config = CfgNode(DATA=CfgNode(IMG_SIZE=32), MODEL=CfgNode(NAME="vim"))
    path = write(tmp_path / "x.pth", {"model": model.state_dict(), "config": config, "epoch": 3})
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")
    found = read(path)
    assert (found.used, found.hints.model_name, found.hints.image_size) == ("model", "vim", 32)
    # A configuration of another shape is no reason to refuse the weights.
    odd = write(tmp_path / "y.pth", {"model": model.state_dict(), "config": {"MODEL": 1}})
    assert read(odd).hints.image_size is None


# --- refusals


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pth: there is no such file"):
        load(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"hello\n", "is a text file"),
        (b"<!DOCTYPE html><html>\n", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*\n.*git lfs pull"),
        (b"\x1f\x8b\x08\x00" + bytes(100), "is a packed archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file"),
        (b"\x01\x02" + bytes(100), "not a checkpoint of a known format"),
        (b"\x80\x02}q\x00X\x05\x00", "cut off or damaged"),
        (b"\xff\x00\x00\x00\x00\x00\x00\x00{", "cut off or damaged"),
        (b"PK\x03\x04" + bytes(100), "cut off or damaged"),
    ],
    ids=["empty", "text", "html", "lfs", "gzip", "hdf5", "unknown", "pickle", "safetensors", "zip"],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(tmp_path: Path, model: Vim, kind: str, part: float) -> None:
    path = tmp_path / "vim.pth"
    if kind == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="is cut off or damaged"):
        load(path)


def test_a_pickle_that_could_run_code_is_refused_by_name(tmp_path: Path, model: Vim) -> None:
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    path = write(tmp_path / "bomb.pth", {"model": model.state_dict(), "x": Bomb()})
    with pytest.raises(CheckpointError, match=r"`\w+\.mkdir`.*could run code\n.*weights_only=False"):
        load(path)
    assert not marker.exists()
    with pytest.raises(CheckpointError, match=r"refers to `\S*Opaque`"):
        load(write(tmp_path / "object.pth", {"model": model.state_dict(), "x": Opaque()}))
    with pytest.raises(CheckpointError, match=r"refers to `ssmprune_cli\.models\.mamba\.vim\.Vim`"):
        load(write(tmp_path / "whole.pth", model))


def test_zips_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vim.pth", b"x")
    with pytest.raises(CheckpointError, match="a zip archive, but no PyTorch checkpoint"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:  # the layout of torch.jit.save
        archive.writestr("model/data.pkl", b"x")
        archive.writestr("model/constants.pkl", b"x")
    with pytest.raises(CheckpointError, match="TorchScript"):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, "holds no weights"),
        ({"epoch": 3}, "holds no weights"),
        ({"a": torch.zeros(2), "epoch": 3}, "mixes weights with other things: epoch"),
        ({"a": torch.zeros(2), "module.a": torch.zeros(2)}, "has the weight a twice"),
    ],
)
def test_contents_that_are_no_weights(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path / "x.pth", content))


def test_weights_that_are_not_finite_are_named(tmp_path: Path, model: Vim) -> None:
    state = model.state_dict()
    state["head.bias"][1] = torch.nan
    state["layers.2.mixer.D"][0] = torch.inf
    path = write(tmp_path / "vim.pth", state)
    with pytest.raises(CheckpointError, match=r"2 weights have values that are not finite: .*D, head\.bias"):
        opened(path)


def test_a_partial_or_foreign_weight_is_never_loaded(tmp_path: Path, model: Vim) -> None:
    state = model.state_dict()
    short = {key: value for key, value in state.items() if key != "layers.3.norm.weight"}
    with pytest.raises(CheckpointError, match=r"layers\.3\.norm\.weight is missing"):
        opened(write(tmp_path / "vim_a.pth", short))
    with pytest.raises(CheckpointError, match=r"extra\.bias is unknown"):
        opened(write(tmp_path / "vim_b.pth", {**state, "extra.bias": torch.zeros(1)}))
    whole = {**state, "head.bias": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match=r"head\.bias is of type torch\.int64"):
        opened(write(tmp_path / "vim_c.pth", whole))


# --- our own folders


def pruned(alignment: str = "calibrated") -> Vim:
    model = make()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    compress(model, 0.6, alignment=alignment, calibration=images if alignment == "calibrated" else None)
    return model


@pytest.mark.parametrize("alignment", ["calibrated", "null", "neighbour", "none"])
def test_a_pruned_model_comes_back_as_it_was(tmp_path: Path, alignment: str) -> None:
    model, folder = pruned(alignment), tmp_path / "out"
    save(folder, model, {"recipe.yaml": "format: 1\n", "picture.png": b"\x89PNG"})
    assert set(tree(folder)) == {"config.json", "model.safetensors", "recipe.yaml", "picture.png"}
    assert (folder / "recipe.yaml").read_text() == "format: 1\n"
    loaded = load(folder)
    assert same_weights(loaded, model) and loaded.config == model.config and not loaded.training
    assert loaded.pruner.settings == model.pruner.settings  # type: ignore[union-attr]
    batch = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(batch), model(batch))


def test_a_dense_model_with_options_comes_back(tmp_path: Path) -> None:
    model = make(replace(CONFIG, class_token="head", rope=True, divide_out=False, norm="layer", image_size=(32, 48)))
    save(tmp_path / "out", model)
    loaded = load(tmp_path / "out")
    assert loaded.config == model.config and same_weights(loaded, model) and loaded.pruner is None


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name, pruned(), {"x": "y"})
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert checkpoint.sha256(tmp_path / "a") == checkpoint.sha256(tmp_path / "b")
    save(tmp_path / "c", pruned("null"))
    assert checkpoint.sha256(tmp_path / "c") != checkpoint.sha256(tmp_path / "a")


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")  # the test vector of FIPS 180
    assert checkpoint.sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_what_is_overwritten(tmp_path: Path, model: Vim) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    save(folder, model)  # an empty folder is as good as none
    before = tree(folder)
    with pytest.raises(CheckpointError, match=r"not empty\n.*--overwrite"):
        save(folder, pruned())
    assert tree(folder) == before
    save(folder, pruned(), {"new.txt": "x"}, overwrite=True)
    assert tree(folder).keys() == {"config.json", "model.safetensors", "new.txt"} and load(folder).pruner is not None
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(CheckpointError, match="something else than an output of ssmprune"):
        save(foreign, model, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        save(tmp_path / "file", model, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "photos"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["write", "rename", "exchange"])
def test_a_failed_save_leaves_everything_as_it_was(
    tmp_path: Path, model: Vim, monkeypatch: pytest.MonkeyPatch, overwrite: bool, stop: BaseException, step: str
) -> None:
    folder = tmp_path / "out"
    overwrite = overwrite or step == "exchange"  # of two folders
    if overwrite:
        save(folder, model)
    before = tree(tmp_path)
    opened, rename = Path.open, Path.rename

    def failing_open(path: Path, *arguments: Any, **options: Any) -> Any:
        file = opened(path, *arguments, **options)
        if step == "write" and path.name == "model.safetensors":
            file.write(bytes(100))
            file.close()
            raise stop
        return file

    def failing_rename(path: Path, target: Path) -> Path:
        if step == "rename" and path.suffix == ".tmp":
            raise stop
        return rename(path, target)

    def failing_exchange(first: Path, second: Path) -> bool:
        if step == "exchange":
            raise stop
        return step != "rename" and exchange(first, second)

    exchange = replacing._exchange
    monkeypatch.setattr(replacing, "_exchange", failing_exchange)
    monkeypatch.setattr(Path, "open", failing_open)
    monkeypatch.setattr(Path, "rename", failing_rename)
    if isinstance(stop, OSError):
        with pytest.raises(CheckpointError, match=r"out: the disk is full; writing needs 0\.\d MB"):
            save(folder, pruned(), overwrite=overwrite)
    else:
        with pytest.raises(KeyboardInterrupt):
            save(folder, pruned(), overwrite=overwrite)
    monkeypatch.undo()
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])


def test_folders_that_are_not_ours(tmp_path: Path, model: Vim) -> None:
    with pytest.raises(CheckpointError, match=r"a folder without config\.json.*\nGive the checkpoint file itself"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(CheckpointError, match=r"is not a config\.json of ssmprune"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, and this ssmprune reads version 1"),
        ({"config": None}, "missing or damaged"),
        ({"config": {"depht": 4}}, "configuration is not valid: .*depht"),
        ({"config": {"depth": 0}}, "configuration is not valid: depth"),
        ({"family": "vimm"}, "unknown model family 'vimm'"),
        ({"pruning": {"points": [1]}}, "pruning settings are not valid"),
        ({"pruning": {"schedule": {"points": [1, 2, 3], "tokens": [16, 0, 0]}}}, "cannot keep 0 of 16 patch tokens"),
        ({"pruning": {"schedule": {"points": [1, 2, 3], "tokens": [9, -5, 3]}}}, "cannot keep -5 of 9 patch tokens"),
        ({"pruning": {"schedule": {"points": [1, 2, 3], "tokens": [10**9, 6, 3]}}}, "cannot keep 1000000000 of 16"),
        ({"pruning": {"schedule": {"points": [2, 1, 3], "tokens": [9, 6, 3]}}}, "in rising order"),
        ({"pruning": {"schedule": {"points": [1, 2], "tokens": [9, 6, 3]}}}, "3 values for 2 points"),
        ({"pruning": {"schedule": {"points": [1.5], "tokens": [9]}}}, r"schedule\.points\.0: .*integer"),
        ({"pruning": {"schedule": {"points": [1], "tokens": [9]}, "importanse": "clip"}}, "importanse is unknown"),
        ({"config": {"depth": 10**9}}, "depth is larger than 78 weights can be"),
        ({"config": {"depth": "4"}}, "depth: Input should be a valid integer"),
        ({"config": {"image_size": [1 << 30, 32]}}, "image_size is larger than"),
        ({"pruning": None}, r"pruner\.alignment_1 is unknown"),
    ],
)
def test_a_damaged_config_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save(tmp_path / "out", pruned())
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((CheckpointError, UsageError), match=message):
        load(tmp_path / "out")


def test_a_compressed_model_is_compressed_anew_from_its_dense_weights(tmp_path: Path) -> None:
    dense, folder = make(), tmp_path / "out"
    save(folder, pruned())
    assert checkpoint.is_compressed(folder) and not checkpoint.is_compressed(VIM_LIKE)
    source = Source(folder)
    loaded = source.load()
    assert loaded.pruner is None and same_weights(loaded, dense)
    result = compress_checkpoint(CompressRequest(source, keep="0.8", dry_run=True))
    (warning,) = result.warnings
    assert warning.startswith("The input is compressed already: its dense weights are compressed anew")
    assert result.report.dense == figures(dense)
    assert Source(folder, Reading(image_size=48)).load().image_size == (48, 48)  # its pruner is gone


def test_weights_without_their_config_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "out", pruned())
    with pytest.raises(CheckpointError, match="those of a compressed model: give the folder"):
        load(tmp_path / "out" / "model.safetensors")
    shutil.copytree(tmp_path / "out", tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "half")


def test_a_folder_knows_what_it_is(tmp_path: Path) -> None:
    save(tmp_path / "out", pruned())
    assert load(tmp_path / "out", family="vim").config == CONFIG
    with pytest.raises(UsageError, match="says vim, not vim_tiny"):
        load(tmp_path / "out", variant="vim_tiny")


# --- resizing


def test_resizing_on_request(tmp_path: Path, model: Vim) -> None:
    path = write(tmp_path / "vim.pth", model.state_dict())
    resized = load(path, image_size=48, stride=8)
    assert resized.config == replace(CONFIG, image_size=(48, 48), eval_crop_ratio=None)
    old, new = model.state_dict(), resized.state_dict()
    assert torch.equal(new["pos_embed"][:, 18], old["pos_embed"][:, 8])  # the class token: 16 // 2 to 36 // 2
    assert all(torch.equal(value, old[key]) for key, value in new.items() if key != "pos_embed")
    assert resized(torch.zeros(1, 3, 48, 48)).shape == (1, 3)
    assert same_weights(load(path, image_size=32), model)


def test_a_compressed_model_is_not_resized(tmp_path: Path) -> None:
    save(tmp_path / "out", pruned())
    assert load(tmp_path / "out", image_size=32).image_size == (32, 32)
    with pytest.raises(CheckpointError, match="image size of a compressed model is fixed"):
        load(tmp_path / "out", image_size=48)
