"""Files of mmsegmentation: containers of mmcv and mmengine, what they state, hostile ones; artefacts of segmenters."""

from __future__ import annotations

import json
import pickle  # noqa: TID251 (to write what must not be read)
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssmprune_cli.checkpoint import is_compressed, load, load_as, save
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models import FAMILIES, DenseModel, Segmenter, resize, sides
from ssmprune_cli.models.heads import UperNetConfig
from ssmprune_cli.models.plainmamba.model import PlainMambaConfig
from ssmprune_cli.preprocessing import KeepRatio, Reading
from ssmprune_cli.pruning import TokenPruner, compress, restore
from ssmprune_cli.workflows.inspect import inspect

MMENGINE = Path(__file__).parent / "golden" / "containers" / "vmamba_upernet_mmengine.pth"
ENCODER = PlainMambaConfig(
    (80, 80), patch_size=8, embed_dim=16, depth=2, d_state=4, out_indices=(0, -1), num_classes=0, positions=(2, 2)
)
# A configuration of mmsegmentation 0.x, as mmcv stores it: the text of a Python file.
CONFIG = """
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug',
        img_scale=(320, 80),
        flip=False,
        transforms=[
            dict(type='AlignedResize', keep_ratio=True, size_divisor=32),
            dict(type='RandomFlip'),
            dict(type='Normalize', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img'])
        ])
]
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='PlainMambaSeg', out_indices=[0, 1], final_norm=True),
    decode_head=dict(
        type='UPerHead', in_index=[0, 1], pool_scales=(1, 3), dropout_ratio=0.1, align_corners=False,
        norm_cfg=dict(type='SyncBN', requires_grad=True)),
    auxiliary_head=dict(type='FCNHead', in_index=1, align_corners=False, act_cfg=dict(type='GELU')),
    test_cfg=dict(mode='whole'))
"""


def build() -> Segmenter:
    torch.manual_seed(0)
    family = FAMILIES.get("plainmamba-upernet")
    head = UperNetConfig(in_channels=(16, 16), channels=6, num_classes=3, pool_scales=(1, 3))
    model = family.build(family.config_class(encoder=ENCODER, head=head, preprocessing=KeepRatio(320, 80, 32)))
    assert isinstance(model, Segmenter)
    return model.eval()


def published(model: DenseModel) -> dict[str, Tensor]:
    """The weights in the authors' names, with an auxiliary head and mmcv's moving average among them."""
    state = {}
    for key, value in model.state_dict().items():
        name = key.removeprefix("encoder.") if key.startswith("encoder.") else key.replace("head.", "decode_head.", 1)
        state[name] = value
    return {**state, "auxiliary_head.conv_seg.weight": torch.zeros(3, 4, 1, 1), "ema_backbone_ln1": torch.zeros(2)}


def mmcv_file(folder: Path, text: str = CONFIG, **meta: Any) -> Path:
    content = {"meta": {"epoch": 3, "config": text, "mmcv_version": "1.7.2", **meta}, "state_dict": published(build())}
    torch.save(content, folder / "upernet.pth")
    return folder / "upernet.pth"


def opened(path: Path, **options: Any) -> DenseModel:
    model = load(path, **options)
    assert isinstance(model, DenseModel)
    return model


def same(first: DenseModel, second: DenseModel) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


# --- containers


def test_a_container_of_mmengine() -> None:
    """Its pickle refers to `getattr` and a class of mmengine, which nothing here needs."""
    with pytest.raises(pickle.UnpicklingError):
        torch.load(MMENGINE, weights_only=True)
    found = inspect(MMENGINE)
    assert (found.family, found.task, found.num_classes) == ("vmamba-upernet", "segmentation", 7)
    assert found.container["entries"] == ["meta", "state_dict", "message_hub", "optimizer", "param_schedulers"]
    assert found.preprocessing is not None
    assert [found.preprocessing[name] for name in ("long", "short", "divisor")] == [2048, 512, 1]
    # The 150 names of ADE20K lie beside a head of 7 classes: they are none of its.
    assert found.class_names == () and found.image_size == (512, 512)
    said = ("vmamba_upernet_mmengine.pth names 150 classes, and its head has 7: the names are left out.",)
    assert found.notes == load(MMENGINE).notes == said


@pytest.mark.parametrize("protocol", [2, 4])
def test_histories_of_mmengine_in_any_protocol(tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("mmengine.logging.history_buffer")
    methods = {name: lambda self: 0.0 for name in ("min", "max", "current", "mean")}
    buffer = type("HistoryBuffer", (), {"__module__": module.__name__, **methods})
    for name, method in methods.items():
        method.__module__, method.__qualname__ = module.__name__, f"HistoryBuffer.{name}"
    module.HistoryBuffer = buffer  # type: ignore[attr-defined]
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    history = buffer()
    history.__dict__.update(_log_history=np.arange(3.0), _statistics_methods=OrderedDict(methods))
    model = build()
    content = {
        "meta": {"dataset_meta": {"classes": ("sky", "road", "tree"), "palette": [[0, 0, 0]] * 3}, "cfg": CONFIG},
        "state_dict": published(model),
        "message_hub": {"log_scalars": {"train/loss": history}, "runtime_info": {"iter": np.float64(1)}},
    }
    torch.save(content, tmp_path / "iter_3.pth", pickle_protocol=protocol)
    monkeypatch.undo()
    loaded = load(tmp_path / "iter_3.pth")
    assert isinstance(loaded, DenseModel) and same(loaded, model) and "mmengine" not in sys.modules
    assert loaded.class_names == ("sky", "road", "tree")


HISTORY = b"cmmengine.logging.history_buffer\nHistoryBuffer\n"
GETATTR = b"c__builtin__\ngetattr\n"
HOSTILE = {
    "getattr of a module": (GETATTR + b"(cos\nsystem\nV__call__\ntR", "os.system"),
    "another function": (b"cposix\nsystem\n(Vtouch run\ntR", "posix.system"),
    "getattr of a history's class": (
        GETATTR + b"(" + HISTORY + b"V__class__\ntR",
        "getattr of .*HistoryBuffer.__class__",
    ),
    "getattr of a constructor": (GETATTR + b"(" + HISTORY + b"V__init__\ntR", "getattr of .*HistoryBuffer.__init__"),
    "getattr of getattr": (GETATTR + b"(" + GETATTR + b"V__self__\ntR", "getattr of builtins.getattr.__self__"),
    "getattr of text": (GETATTR + b"(Vtext\nVformat\ntR", "getattr of str.format"),
    "getattr of a dict": (GETATTR + b"(ccollections\nOrderedDict\nVfromkeys\ntR", "getattr of collections.OrderedDict"),
    "getattr of a history": (GETATTR + b"(" + HISTORY + b")R" + b"Vmean\ntR", "getattr of _Inert.mean"),
    "a name deeper inside": (b"cmmengine.logging.history_buffer\nHistoryBuffer.__init__\n", "HistoryBuffer.__init__"),
    "another name of the module": (b"cmmengine.logging.history_buffer\nos\n", "mmengine.logging.history_buffer.os"),
    "another class of mmengine": (b"cmmengine.runner\nRunner\n)R", "mmengine.runner.Runner"),
    "eval": (b"c__builtin__\neval\n(V1\ntR", "builtins.eval"),
    "setattr": (b"c__builtin__\nsetattr\n", "builtins.setattr"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_but_a_history_has_attributes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickled, named = HOSTILE[name]
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}V" + b"message_hub\n" + pickled + b"s.")
    with pytest.raises(CheckpointError, match=rf"it refers to `.*{named}.*`, and reading that could run code"):
        load(tmp_path / "a.pth")
    assert [each.name for each in tmp_path.iterdir()] == ["a.pth"]


def test_a_method_of_a_history_is_not_called(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + GETATTR + b"(" + HISTORY + b"Vmean\ntR)R.")
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        load(tmp_path / "a.pth")


# --- what a file states


def test_a_container_of_mmcv(tmp_path: Path) -> None:
    path = mmcv_file(tmp_path, CLASSES=("sky", "road", "tree"), PALETTE=None)
    model = opened(path)
    assert same(model, build())
    assert model.preprocessing == KeepRatio(320, 80, divisor=32, fill="resize")
    assert model.config == replace(build().config, class_names=("sky", "road", "tree"))
    assert model.class_names == ("sky", "road", "tree") and model.image_size == (80, 80)


PIPELINE = CONFIG[CONFIG.index("test_pipeline") : CONFIG.index("model =")]
MMSEG1 = "test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(300, 90), keep_ratio=True), {}]\n"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("img_scale=(320, 80)", "img_scale=(90, 400)", KeepRatio(400, 90, 32)),
        ("size_divisor=32", "size_divisor=16", KeepRatio(320, 80, 16)),
        ("AlignedResize', keep_ratio=True, size_divisor=32", "Resize', keep_ratio=True", KeepRatio(320, 80)),
        ("to_rgb=True", "to_rgb=False", KeepRatio(320, 80, 32, channels="bgr")),
        (PIPELINE, MMSEG1.format("dict(type='LoadAnnotations'), dict(type='PackSegInputs')"), KeepRatio(300, 90)),
        (PIPELINE, MMSEG1.format("dict(type='ResizeToMultiple', size_divisor=8)"), KeepRatio(300, 90, 8)),
        (PIPELINE, MMSEG1.format("dict(type='Pad', size_divisor=16)"), KeepRatio(300, 90, 16, "pad")),
        (
            "test_cfg=dict(mode='whole')",
            "data_preprocessor=dict(test_cfg=dict(size_divisor=64))",
            "its test pipeline fills images up twice",
        ),
        (
            PIPELINE,
            "data = dict(test=dict(pipeline=[dict(type='Resize', scale=(300, 90), keep_ratio=True)]))\n",
            KeepRatio(300, 90),
        ),
        (  # said by a step alone
            CONFIG[: CONFIG.index("model =")],
            MMSEG1.format("dict(type='Normalize', mean=[0, 0, 0], std=[51, 102, 255], to_rgb=False)"),
            KeepRatio(300, 90, mean=(0, 0, 0), std=(0.2, 0.4, 1.0), channels="bgr"),
        ),
        (
            "[58.395, 57.12, 57.375], to_rgb=True),\n",
            "[50.0, 57.12, 57.375], to_rgb=True),\n",
            "says the deviation more than once",
        ),
        ("flip=False", "flip=True", "at several sizes, or flipped"),
        ("img_scale=(320, 80)", "img_scale=[(320, 80), (640, 160)]", "not a long and a short side"),
        ("keep_ratio=True, size", "keep_ratio=False, size", "resizes images out of proportion"),
        ("dict(type='RandomFlip')", "dict(type='CenterCrop', crop_size=64)", "has the step CenterCrop"),
        (PIPELINE, MMSEG1.format("dict(type='Pad', size=(512, 512))"), "has the step Pad"),
        (PIPELINE, MMSEG1.replace("keep_ratio=True", "keep_ratio=True, interpolation='bicubic'"), "resizes bicubic"),
        ("align_corners=False,\n", "align_corners=True,\n", "decode_head.align_corners True"),
        ("type='UPerHead'", "type='PSPHead'", "decode_head PSPHead"),
        ("norm_cfg=dict(type='SyncBN'", "act_cfg=dict(type='GELU'", "decode_head.act_cfg GELU"),
        ("in_index=[0, 1], pool", "in_index=[1, 0], pool", r"decode_head.in_index \(1, 0\)"),
        ("mode='whole'", "mode='slide', crop_size=(64, 64), stride=(43, 43)", "test_cfg.mode slide"),
        ("final_norm=True", "final_norm=False", "final_norm False"),
        ("pool_scales=(1, 3)", "pool_scales=(1, 2, 3)", "pools its features to 2 sizes, and the file says 1, 2, 3"),
    ],
)
def test_statements_are_heeded_or_refused_by_name(
    old: str, new: str, expected: KeepRatio | str, tmp_path: Path
) -> None:
    assert old in CONFIG
    path = mmcv_file(tmp_path, CONFIG.replace(old, new))
    if isinstance(expected, KeepRatio):
        assert opened(path).preprocessing == expected
        return
    with pytest.raises(CheckpointError, match=expected):
        load(path)


def test_without_a_word_on_images_their_size_is_asked_for(tmp_path: Path) -> None:
    path = mmcv_file(tmp_path, CONFIG.replace(PIPELINE, ""))
    with pytest.raises(CheckpointError, match=r"to what size images are resized(.|\n)*--image-size 512"):
        load(path)
    model = opened(path, image_size=64)
    assert model.preprocessing == KeepRatio(256, 64, divisor=32) and model.image_size == (64, 64)
    # What its user says goes before what the file says, also of a way that is not known here.
    model = opened(mmcv_file(tmp_path), image_size=160)
    assert model.preprocessing == KeepRatio(640, 160, divisor=32)
    assert load(mmcv_file(tmp_path, CONFIG.replace("flip=False", "flip=True")), image_size=64).image_size == (64, 64)
    assert opened(path, image_size=64, mean=(0, 0, 0), std=(1, 1, 1)).preprocessing == KeepRatio(
        256, 64, divisor=32, mean=(0, 0, 0), std=(1, 1, 1)
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"crop": 0.875}, "--crop: a UperNet on PlainMamba is given whole images"),
        ({"interpolation": "bicubic"}, "--interpolation: a UperNet on PlainMamba is given whole images"),
        ({"stride": 8}, "there is no `--stride` to choose"),
        ({"variant": "upernet_plainmamba_l1"}, r"and the encoder makes them of \(192, 192, 192, 192\)"),
        ({"family": "plainmamba"}, "head.fc.weight is missing"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, CheckpointError), match=match):
        load(mmcv_file(tmp_path), **options)


def test_our_own_names_are_read_as_well(tmp_path: Path) -> None:
    model = build()
    torch.save({"meta": {"config": CONFIG}, "state_dict": model.state_dict()}, tmp_path / "own.pth")
    loaded = load(tmp_path / "own.pth")
    assert isinstance(loaded, DenseModel) and same(loaded, model) and loaded.config == model.config
    both = {**model.state_dict(), "decode_head.conv_seg.bias": torch.zeros(3)}
    torch.save({"meta": {"config": CONFIG}, "state_dict": both}, tmp_path / "both.pth")
    with pytest.raises(CheckpointError, match=r"has the weight head\.conv_seg\.bias twice"):
        load(tmp_path / "both.pth")


def test_a_head_for_one_class_is_refused(tmp_path: Path) -> None:
    state = published(build())
    state |= {f"decode_head.conv_seg.{name}": state[f"decode_head.conv_seg.{name}"][:1] for name in ("weight", "bias")}
    torch.save({"state_dict": state, "meta": {"config": CONFIG}}, tmp_path / "one.pth")
    with pytest.raises(CheckpointError, match="tells one class from the background by a threshold"):
        load(tmp_path / "one.pth")


# --- artefacts


def test_a_compressed_segmenter_is_saved_and_loaded_byte_for_byte(tmp_path: Path) -> None:
    model = load(mmcv_file(tmp_path, CLASSES=("sky", "road", "tree")))
    batches = [torch.randn(1, 3, 80, 107), torch.randn(2, 3, 64, 80)]
    compress(model, 0.6, points=[1], reduction="drop", calibration=batches)
    save(tmp_path / "first", model)
    loaded = load(tmp_path / "first")
    assert isinstance(loaded.pruner, TokenPruner) and is_compressed(tmp_path / "first")
    save(tmp_path / "second", loaded)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    dense = load_as(tmp_path / "first", Reading(), dense=True)
    with torch.no_grad():
        assert all(torch.equal(loaded(batch), model(batch)) for batch in batches)
        restore(model)
        assert all(torch.equal(dense(batch), model(batch)) for batch in batches)
    assert loaded.class_names == ("sky", "road", "tree")
    with pytest.raises(CheckpointError, match="image size of a compressed model is fixed"):
        load(tmp_path / "first", image_size=64)
    with pytest.raises(UsageError, match="is given whole images"):
        load(tmp_path / "first", crop=1.0)


def test_a_segmenter_for_smaller_images(tmp_path: Path) -> None:
    model = opened(mmcv_file(tmp_path))
    assert sides(model) == (72, 64, 56, 48, 40)
    smaller = resize(model, 48)
    assert isinstance(smaller, DenseModel)
    assert smaller.preprocessing == KeepRatio(192, 48, divisor=32) and smaller.image_size == (48, 48)
    assert smaller.config.resized_from == (80, 80) and sides(smaller) == ()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(smaller(images), model(images))  # one way to compute it, whatever tokens are counted for
    save(tmp_path / "smaller", smaller, dense=model)
    assert is_compressed(tmp_path / "smaller") and load(tmp_path / "smaller").config == smaller.config
    assert load_as(tmp_path / "smaller", Reading(), dense=True).config == model.config


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("encoder", "depth"), 1 << 40, "depth is larger than"),
        (("head", "channels"), 1 << 40, "channels is larger than"),
        (("head", "pool_scales"), [1 << 30], "pool_scales is larger than"),
        (("preprocessing", "short"), -1, "cannot be resized"),
        (("encoder", "embed_dim"), "16", "embed_dim"),
        (("head",), None, "head"),
        (("class_names",), ["sky"], "1 names of classes for 3 classes"),
        (("sort",), 1, "sort is unknown"),
    ],
)
def test_a_damaged_configuration(path: tuple[str, ...], value: Any, match: str, tmp_path: Path) -> None:
    save(tmp_path / "out", build())
    file = tmp_path / "out" / "config.json"
    content = json.loads(file.read_text())
    inner = content["config"]
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path / "out")


def test_the_command_says_what_a_segmenter_is(tmp_path: Path) -> None:
    path = mmcv_file(tmp_path, CLASSES=("sky", "road", "tree"))
    command = [sys.executable, "-m", "ssmprune_cli", "inspect", str(path), "--json"]
    facts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (facts["family"], facts["task"]) == ("plainmamba-upernet", "segmentation")
    assert facts["class_names"] == ["sky", "road", "tree"] and facts["preprocessing"]["short"] == 80
