"""What a checkpoint says of itself and what its user says: heeded, asked for or refused by name, and never guessed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from ssmprune_cli.checkpoint import load, read, save
from ssmprune_cli.cli.app import app
from ssmprune_cli.data.preprocess import preprocess, visible_box
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from ssmprune_cli.pruning.images import _by_preprocessing
from ssmprune_cli.recipe import Training
from ssmprune_cli.workflows.finetune.augment import training_image
from ssmprune_cli.workflows.reporting.kept import pixels as shown_pixels

ROOT = Path(__file__).parent.parent
COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
CONFIG = VimConfig(image_size=(48, 48), patch_size=8, stride=8, embed_dim=16, depth=2, num_classes=3)


def write(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def vim(**change: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return Vim(replace(CONFIG, **change)).state_dict()


def vmamba() -> dict[str, Any]:
    torch.manual_seed(0)
    return VMamba(VMambaConfig(image_size=(64, 64), embed_dim=16, depths=(1, 1), num_classes=3)).state_dict()


def ssmprune(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ssmprune_cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# --- the geometry of files that have lost their container


@pytest.mark.parametrize(
    ("file", "options", "asked"),
    [
        ("benchmarks/vim_tiny_cifar10.pth", {"stride": 2}, r"256 patch .*--image-size 34 --stride 2; --image-size 64"),
        (
            "recipes/demo/vim_digits.pth",
            {"image_size": 64},
            r"225 patch .*--image-size 64 --stride 4; --image-size 120",
        ),
    ],
)
def test_bare_weights_are_read_as_the_file_or_not_at_all(
    tmp_path: Path, file: str, options: dict[str, Any], asked: str
) -> None:
    whole = load(ROOT / file)
    bare = write(tmp_path / "best.pth", torch.load(ROOT / file, weights_only=False)["model"])
    with pytest.raises(CheckpointError, match=rf"neither the weights nor the file say.*\n{asked}"):
        load(bare, family="vim")
    model = load(bare, family="vim", **options)
    assert replace(model.config, eval_crop_ratio=1.0) == whole.config
    with pytest.raises(UsageError, match=r"how images are resized and cropped.*\nGive `--crop 1\.0`"):
        _ = model.preprocessing
    assert load(bare, family="vim", crop=1.0, **options).preprocessing == whole.preprocessing
    images = torch.zeros(1, 3, *whole.image_size)
    with torch.no_grad():
        assert torch.equal(model(images), whole(images))


def test_bare_weights_of_vmamba_have_no_size(tmp_path: Path) -> None:
    whole = load(ROOT / "benchmarks" / "vmamba_cifar10.pth")
    content = torch.load(ROOT / "benchmarks" / "vmamba_cifar10.pth", weights_only=False)
    bare = write(tmp_path / "best.pth", content["model"])
    with pytest.raises(CheckpointError, match=r"say which image size.*\n.*--image-size 224"):
        load(bare)
    assert load(bare, image_size=64, crop=1.0).config == whole.config
    with pytest.raises(UsageError, match="no `--stride` to choose"):
        load(bare, image_size=64, stride=4)


def test_the_size_that_is_asked_for_tells_the_stride(tmp_path: Path) -> None:
    path = write(tmp_path / "vim.pth", vim(image_size=(32, 32), stride=4))
    assert load(path, image_size=32).config.stride == 4  # 49 positions, which 56 pixels have at a stride of 8
    assert load(path, image_size=56).config.stride == 8
    with pytest.raises(UsageError, match=r"do not fill images of 50 pixels: 2 are left over\n.*48` or .*52`"):
        load(path, image_size=50, stride=4)
    with pytest.raises(UsageError, match=r"--image-size: must be from 1 to"):
        load(path, image_size=0)
    with pytest.raises(UsageError, match=r"--stride: must be from 1 to"):
        load(path, stride=0)


def test_every_command_asks_in_the_same_words(tmp_path: Path) -> None:
    bare = write(tmp_path / "vim.pth", vim())
    done = ssmprune("inspect", bare)
    assert (done.returncode, done.stdout) == (1, "")
    assert "36 patch positions and 8-pixel patches fit: --image-size 18 --stride 2" in done.stderr
    facts = json.loads(ssmprune("inspect", bare, "--stride", "8", "--crop", "0.5", "--json").stdout)
    assert (facts["image_size"], facts["preprocessing"]["resize"]) == ([48, 48], 96)


@pytest.mark.parametrize(
    "command",
    ["compress", "search", "sensitivity", "compare", "eval", "profile", "inspect", "visualize", "finetune"],
)
def test_every_command_that_loads_has_the_options(command: str) -> None:
    options = {name for each in COMMANDS[command].params for name in each.opts}
    names = ("family", "variant", "weights", "image-size", "stride", "crop", "interpolation", "mean", "std")
    assert [name for name in names if f"--{name}" not in options] == []


# --- what is said stays said


def test_an_artefact_keeps_how_its_checkpoint_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "vim.pth", vim())
    options: dict[str, Any] = {
        "crop": 0.5,
        "interpolation": "bilinear",
        "mean": (0.5, 0.4, 0.3),
        "std": (1.0, 2.0, 3.0),
    }
    model = load(path, stride=8, **options)
    assert model.preprocessing == Preprocessing(96, 48, "bilinear", (0.5, 0.4, 0.3), (1.0, 2.0, 3.0))
    save(tmp_path / "out", model)
    assert load(tmp_path / "out").config == model.config
    assert load(tmp_path / "out", crop=1.0).preprocessing == replace(model.preprocessing, resize=48)
    with pytest.raises(UsageError, match=r"says a stride of 8, not 4\n"):
        load(tmp_path / "out", stride=4)


@pytest.mark.parametrize(("side", "resize"), [(32, 32), (40, 45)])
def test_small_images_are_neither_resized_nor_cropped(tmp_path: Path, side: int, resize: int) -> None:
    args = argparse.Namespace(input_size=side, eval_crop_ratio=0.875)
    path = write(tmp_path / "vim.pth", {"model": vim(image_size=(side, side)), "args": args})
    assert load(path).preprocessing == Preprocessing(resize, side)
    if side == 32:
        with pytest.raises(UsageError, match=r"--crop: images of 32 pixels are not cropped"):
            load(path, crop=0.5)


# --- what files state


SWIN = {"DATA": {"IMG_SIZE": 48, "INTERPOLATION": "bicubic"}, "TEST": {"CROP": True}}
TIMM = {"input_size": [3, 48, 48], "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.25] * 3}
# Rounded as what a file states is, so that 57.12 of 255 is 0.224.
BLUE_FIRST = (round(103 / 255, 12), round(116 / 255, 12), round(123 / 255, 12))
SQUEEZED = "test_pipeline = [dict(type='Resize', scale=(54, 54))"
MMENGINE = """
model = dict(backbone=dict(type='Vim', img_size=48))
data_preprocessor = dict(mean=[127.5, 127.5, 127.5], std=[51, 51, 51], to_rgb=True)
test_pipeline = [dict(type='ResizeEdge', scale=64, edge='short'), dict(type='CenterCrop', crop_size=48)]
"""


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ({"args": {"input_size": 48, "eval_crop_ratio": 0.9}}, Preprocessing(53, 48)),
        (
            {"args": argparse.Namespace(img_size=48, crop_pct=1.0, interpolation="bilinear")},
            Preprocessing(48, 48, "bilinear"),
        ),
        ({"args": TIMM}, Preprocessing(48, 48, "bicubic", (0.5,) * 3, (0.25,) * 3)),
        ({"hyper_parameters": {"model": {"image_size": 48}, "eval_crop_ratio": 1.0}}, Preprocessing(48, 48)),
        ({"config": SWIN}, Preprocessing(54, 48)),
        (
            {"config": {"DATA": {"IMG_SIZE": 48, "INTERPOLATION": "lanczos"}, "TEST": {"CROP": False}}},
            Preprocessing(48, 48, "lanczos", squeeze=True),
        ),
        ({"cfg": f"{SQUEEZED}, dict(type='CenterCrop', crop_size=48)]"}, Preprocessing(54, 48, squeeze=True)),
        ({"cfg": f"{SQUEEZED.replace('54', '48')}]"}, Preprocessing(48, 48, squeeze=True)),
        (
            {
                "cfg": "data_preprocessor = dict(mean=[103, 116, 123], std=[51, 51, 51], to_rgb=False)\n"
                "test_pipeline = [dict(type='ResizeEdge', scale=48, interpolation='bilinear'), "
                "dict(type='CenterCrop', crop_size=48)]"
            },
            Preprocessing(48, 48, "bilinear", BLUE_FIRST, (0.2,) * 3, channels="bgr"),
        ),
        ({"meta": {"cfg": MMENGINE}}, Preprocessing(64, 48, "bicubic", (0.5,) * 3, (0.2,) * 3)),
    ],
    ids=[
        *("DeiT", "timm", "timm's tuples", "Lightning", "Swin", "mmengine"),
        *("Swin, squeezed", "squeezed and cropped", "squeezed", "blue first"),
    ],
)
def test_statements_are_heeded(tmp_path: Path, container: dict[str, Any], expected: Preprocessing) -> None:
    path = write(tmp_path / "vim.pth", {"state_dict": vim(), **container})
    assert load(path).preprocessing == expected


@pytest.mark.parametrize(
    ("container", "message", "options"),
    [
        ({"cfg": "test_pipeline = [dict(type='Resize', scale=(64, 48))]"}, r"\[64, 48\]: neither", {"crop": 1.0}),
        ({"config": {"DATA": {"INTERPOLATION": "nearest"}}}, "interpolation nearest", {"interpolation": "bicubic"}),
        ({"config": {"TEST": {"CROP": False}, "cfg": {"TEST": {"CROP": True}}}}, "TEST.CROP more than once", None),
        ({"cfg": "a = dict(to_rgb=False)\nb = dict(to_rgb=True)"}, "whether red comes first more than once", None),
        ({"args": {"input_size": 48, "img_size": 32}}, "says the image size more than once.*: 48, 32", None),
        ({"args": {"input_size": 224}}, "says that images have 224 pixels, but no stride", None),
        ({"args": {"act_layer": "nn.GELU"}}, "says act_layer nn.GELU, and here .* with silu or swish", None),
        ({"config": {"if_bidirectional": True}}, "says if_bidirectional True", None),
        ({"args": {"if_divide_out": "yes"}}, "says if_divide_out yes", None),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(
    tmp_path: Path, container: dict[str, Any], message: str, options: dict[str, Any] | None
) -> None:
    path = write(tmp_path / "vim.pth", {"model": vim(), **container})
    with pytest.raises(CheckpointError, match=message):
        load(path, stride=None if "img" in message or "images have" in message else 8)
    if options is not None:
        load(path, stride=8, **options)


def test_what_a_file_says_of_its_images_stays_in_the_artefact_and_reaches_every_reader(tmp_path: Path) -> None:
    """Squeezed, with blue first: in an artefact, for images of files and arrays, and drawn as they were."""
    config = {"DATA": {"IMG_SIZE": 48, "INTERPOLATION": "bilinear"}, "TEST": {"CROP": False}, "AUG": {"to_rgb": False}}
    model = load(write(tmp_path / "vim.pth", {"model": vim(), "config": config}))
    save(tmp_path / "out", model, {})
    way = load(tmp_path / "out").preprocessing
    assert way == model.preprocessing == Preprocessing(48, 48, "bilinear", squeeze=True, channels="bgr")
    whole = load(tmp_path / "out", crop=1.0).preprocessing
    assert isinstance(whole, Preprocessing) and not whole.squeeze  # what the user says goes first
    pixels = np.random.default_rng(0).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    made = preprocess(Image.fromarray(pixels), way)
    squeezed = Image.fromarray(pixels).resize((48, 48), Image.Resampling.BILINEAR)
    plain = preprocess(squeezed, Preprocessing(48, 48))
    deviation = torch.tensor(IMAGENET_STD)[:, None, None]
    mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
    assert torch.allclose(made * deviation + mean, (plain * deviation + mean).flip(0), atol=1e-6)
    np.testing.assert_array_equal(shown_pixels(made[None], way)[0], np.asarray(squeezed))
    assert visible_box((90, 30), way) == (0, 0, 90, 30)
    arrays = _by_preprocessing(torch.from_numpy(pixels).permute(2, 0, 1)[None], way)[0]
    assert arrays.shape == made.shape and (arrays - made).abs().mean() < 0.02  # another library's resizing
    assert training_image(Image.fromarray(pixels), way, Training(), 0).equal(made)


def test_the_constructors_arguments_of_a_vim_are_heeded(tmp_path: Path) -> None:
    config = {"img_size": 48, "patch_size": 8, "stride": 8, "if_divide_out": False, "use_middle_cls_token": False}
    found = load(write(tmp_path / "vim.pth", {"model": vim(), "config": config})).config
    assert (found.divide_out, found.class_token, found.stride) == (False, "head", 8)
    none = vim(class_token="none")
    with pytest.raises(CheckpointError, match="final_pool_type max"):
        load(write(tmp_path / "vim_max.pth", {"model": none, "config": {**config, "final_pool_type": "max"}}))


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ({"SSM_ACT_LAYER": "gelu"}, False),
        ({"MLP_ACT_LAYER": "relu"}, False),
        ({"SSM_FORWARDTYPE": "v051d"}, False),
        ({"NORM_LAYER": "bn"}, False),
        ({"GMLP": True}, False),
        ({"SSM_FORWARDTYPE": "v05_noz", "SSM_ACT_LAYER": "silu", "MLP_ACT_LAYER": "gelu", "NORM_LAYER": "ln2d"}, True),
    ],
)
def test_settings_of_vmambas_yaml(tmp_path: Path, setting: dict[str, Any], allowed: bool) -> None:
    config = {"DATA": {"IMG_SIZE": 64}, "TEST": {"CROP": True}, "MODEL": {"NAME": "x", "VSSM": setting}}
    path = write(tmp_path / "vssm.pth", {"model": vmamba(), "config": config})
    if allowed:
        assert load(path).preprocessing == Preprocessing(73, 64, "bicubic", IMAGENET_MEAN, IMAGENET_STD)
        return
    ((name, value),) = setting.items()
    with pytest.raises(CheckpointError, match=f"says {name.lower()} {value}, and here VMamba is computed with"):
        load(path)


def test_the_published_plainmamba_with_another_image(tmp_path: Path) -> None:
    config = PlainMambaConfig(image_size=(30, 30), patch_size=4, embed_dim=16, depth=2, num_classes=3)
    torch.manual_seed(0)
    path = write(tmp_path / "p.pth", {"state_dict": PlainMamba(config).state_dict(), "meta": {"cfg": "img_size = 30"}})
    assert load(path).image_size == (30, 30)  # padded to 32; nothing but the file knows
    assert read(path).hints.image_size == 30
