"""A language model through the program: inspect, compress, eval, profile, and what is refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssmprune_cli.models.language.mamba2.model import Mamba2Config, Mamba2LM

Run = Callable[..., subprocess.CompletedProcess[str]]
CONTAINERS = Path(__file__).parents[1] / "golden" / "containers"
VIM, UPERNET = CONTAINERS / "vim_like.pth", CONTAINERS / "vmamba_upernet_mmengine.pth"
WINDOWS = ("--length", "48", "--protect-last", "8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mamba-2 of bytes in state-spaces' layout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("text") / "model"
    folder.mkdir()
    found = Mamba2LM(Mamba2Config(vocab_size=256, embed_dim=16, depth=3, d_state=4, head_dim=8))
    with torch.no_grad():
        found.embedding.weight.mul_(20)
    torch.save({f"backbone.{name}": each for name, each in found.state_dict().items()}, folder / "pytorch_model.bin")
    said = {"d_model": 16, "n_layer": 3, "vocab_size": 256, "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 4}}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{number} times {number} is {number * number}.\n" for number in range(200)))
    return path


def test_text_through_every_command(ssmprune: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", ("--dataset", "text", "--data", text)
    done = ssmprune(
        *("compress", model, *WINDOWS, "--keep", "0.6", "--calib", text, "--calib-images", "24", *data),
        *("--reduction", "drop", "--limit", "12", "--batch-size", "2", "--out", out, "--json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    facts = report["language"]
    assert (report["task"], report["image_size"]) == ("language", [1, 48])
    assert facts["count"] == 12 and facts["tokens"] == 96 and 0 <= facts["agreement"] < 1
    low, high = facts["perplexity_ratio_interval"]
    assert low <= facts["perplexity_ratio"] <= high
    assert facts["perplexity"] / facts["dense"]["perplexity"] == pytest.approx(facts["perplexity_ratio"])
    assert report["pruned"]["tokens_per_block"] == [48, 32, 23] and report["samples"] == []
    assert "perplexity of 96 tokens" in (out / "README.md").read_text()
    assert "windows of 48 tokens" in (out / "README.md").read_text()
    assert "repair is for one that has" in " ".join((out / "README.md").read_text().split())

    done = ssmprune("eval", out, *data, "--compare", model, *WINDOWS, "--limit", "12", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["perplexity"] == pytest.approx(facts["perplexity"], rel=1e-6)
    assert found["agreement"] == facts["agreement"] and found["count"] == 12
    done = ssmprune("eval", out, *data, "--compare", model, *WINDOWS, "--limit", "12")
    assert "12 windows of text" in done.stdout and "perplexity" in done.stdout
    assert "the last tokens are judged" in done.stderr
    done = ssmprune("eval", out, *data, "--compare", model, "--length", "48")  # four tokens, where `out` judges eight
    assert done.returncode == 1 and "the same `--length` and `--protect-last`" in " ".join(done.stderr.split())
    done = ssmprune("eval", out, *data, "--compare", model, *WINDOWS, "--max-drop", "-50")
    assert done.returncode == 3 and "next-token accuracy fell by" in done.stderr

    done = ssmprune("profile", out, "--lengths", "64,256,1k", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    scaled = json.loads(done.stdout)
    assert scaled["sizes"] == [64, 256, 1024] and set(scaled["points"]) == {"out", "dense"}
    assert [point["tokens"] for point in scaled["points"]["out"]] == scaled["sizes"]
    for small, dense in zip(scaled["points"]["out"], scaled["points"]["dense"], strict=True):
        assert small["multiply_adds"] < dense["multiply_adds"] and small["peak_memory_bytes"] > 0
    assert set(scaled["slopes"]["dense"]) == {"exponent", "bytes_per_token"}
    done = ssmprune("profile", out, "--lengths", "64,256", "--rounds", "1", "--format", "csv")
    assert done.stdout.startswith("model,tokens,infer_step_time,") and len(done.stdout.splitlines()) == 5

    done = ssmprune("profile", out, "--rounds", "1")
    assert "windows of text per second" in done.stdout and "images" not in done.stdout

    done = ssmprune("inspect", out, "--json")
    seen = json.loads(done.stdout)
    assert (seen["family"], seen["num_classes"], seen["tokens"], seen["pruning"]["schedule"]["tokens"]) == (
        *("mamba2", 256, 48),
        [24, 15],
    )
    for command, arguments, message in (
        ("visualize", (text, "--out", tmp_path / "pictures"), "takes text, of which there is no picture"),
        ("export", ("--out", tmp_path / "model.onnx"), "is not exported: it takes text"),
        ("finetune", (*data, "--out", tmp_path / "trained"), "a model for language cannot be fine-tuned"),
        ("profile", ("--image-sizes", "32,64"), "--image-sizes: is for images, and a mamba2 takes text"),
    ):
        done = ssmprune(command, out, *arguments)
        assert done.returncode == 2 and message in " ".join(done.stderr.split()), (command, done.stderr)


def test_image_sizes_of_a_pruned_classifier(ssmprune: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = ssmprune("compress", VIM, "--image-size", "64", "--keep", "0.5", "--reduction", "drop", "--out", out)
    assert done.returncode == 0, done.stderr
    options = ("--image-sizes", "64,128", "--rounds", "1", "--plot", tmp_path / "sizes.svg")
    done = ssmprune("profile", out, *options, "--json")
    assert done.returncode == 0 and f"Plot written to {tmp_path / 'sizes.svg'}" in done.stderr.replace("\n", "")
    found = json.loads(done.stdout)
    drawing = (tmp_path / "sizes.svg").read_text()
    for name, slope in found["slopes"].items():
        assert f">{name}: tokens^{slope['exponent']:.2f}<" in drawing
    pruned, dense = found["points"]["out"], found["points"]["dense"]
    assert found["sizes"] == [64, 128] and [point["tokens"] for point in pruned] == [65, 257]
    assert all(one["multiply_adds"] < other["multiply_adds"] for one, other in zip(pruned, dense, strict=True))


def test_image_sizes_of_a_dense_model(ssmprune: Run) -> None:
    """It takes images of any size, and its own is a third one."""
    done = ssmprune("profile", UPERNET, "--image-sizes", "64,128", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (name,) = found["points"]
    assert [point["tokens"] for point in found["points"][name]] == [16 * 16, 32 * 32]
    small, large = (point["peak_memory_bytes"] for point in found["points"][name])
    assert found["slopes"][name]["bytes_per_token"] == pytest.approx((large - small) / (32 * 32 - 16 * 16))


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty: there is no text in it"), ("short", "has 5 tokens in a row, and a window takes 48")],
)
def test_text_without_windows(content: str, message: str, ssmprune: Run, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(content)
    for arguments in (
        ("eval", model, *WINDOWS, "--dataset", "text", "--data", path),
        ("compress", model, *WINDOWS, "--keep", "0.5", "--calib", path, "--out", tmp_path / "out"),
    ):
        done = ssmprune(*arguments)
        assert done.returncode == 1 and message in " ".join(done.stderr.split()) and done.stdout == "", done.stderr
    assert not (tmp_path / "out").exists()


def test_models_and_data_of_two_kinds(ssmprune: Run, model: Path, text: Path, tmp_path: Path) -> None:
    done = ssmprune("eval", VIM, "--image-size", "64", "--dataset", "text", "--data", text)
    assert done.returncode == 2 and "there is no dataset 'text' for classification" in done.stderr
    done = ssmprune("eval", model, "--dataset", "npz", "--data", text)
    assert done.returncode == 2 and "there is no dataset 'npz' for language" in done.stderr
    done = ssmprune("profile", VIM, "--image-size", "64", "--lengths", "1k,4k")
    assert done.returncode == 2 and "--lengths: is for text, and a vim takes images" in " ".join(done.stderr.split())
    done = ssmprune("profile", model, "--plot", tmp_path / "plot.svg")
    assert done.returncode == 2 and "--plot: draws --lengths or --image-sizes" in " ".join(done.stderr.split())
    done = ssmprune("eval", model, "--crop", "0.9", "--dataset", "text", "--data", text)
    assert done.returncode == 2 and "--crop: a Mamba-2 language model takes text" in " ".join(done.stderr.split())
