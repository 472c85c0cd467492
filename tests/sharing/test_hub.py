"""Checkpoints from the hub and to it, against a stub of it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import ssmprune_cli
from ssmprune_cli.checkpoint import hub as hub_module
from ssmprune_cli.checkpoint import hub_address, load, sha256
from ssmprune_cli.errors import CheckpointError, SsmpruneError, UsageError
from ssmprune_cli.recipe import load_recipe
from ssmprune_cli.workflows.compress import CompressRequest, compress_checkpoint
from ssmprune_cli.workflows.source import Source
from tests.sharing.conftest import Hub

VIM_LIKE = Path(__file__).parents[1] / "golden" / "containers" / "vim_like.pth"


def pushed(hub: Hub, commit: str | None = None) -> dict[str, bytes]:
    return hub.files("me/fast", commit or hub.commit("me/fast", "main"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://a/b/c.pth", ("a/b", None, "c.pth")),
        ("hf:/a/b/c.pth", ("a/b", None, "c.pth")),  # as a Path has it
        ("hf://a/b@v1/d/c.pth", ("a/b", "v1", "d/c.pth")),
        ("hf://a/b@refs%2Fpr%2F1/c.pth", ("a/b", "refs/pr/1", "c.pth")),
        ("hf://a/b", ("a/b", None, None)),
    ],
)
def test_addresses(text: str, parts: tuple[str, str | None, str | None]) -> None:
    address = hub_module.parse(text)
    assert (address.repository, address.revision, address.file) == parts
    assert hub_module.parse(str(Path(str(address)))) == address


@pytest.mark.parametrize("text", ["hf://a", "hf://", "hf://a/b@/c", "hf://a/b/../../c.pth", "hf://a/b//etc/passwd"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no address of a file on the hub\nIt looks like hf://OWNER/NAME/FILE"):
        hub_module.parse(text)


def test_a_file_is_loaded_once_and_from_the_cache_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.put("hustvl/vim", {"sub/vim_like.pth": VIM_LIKE.read_bytes()})
    address = Path("hf://hustvl/vim/sub/vim_like.pth")
    found, expected = load(address), load(VIM_LIKE)
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))
    assert hub_address(address) == f"hf://hustvl/vim@{commit}/sub/vim_like.pth" and hub_address(VIM_LIKE) is None
    assert sha256(address) == hashlib.sha256(VIM_LIKE.read_bytes()).hexdigest()
    assert hub.asked.count("GET /hustvl/vim/resolve/main/sub/vim_like.pth") == 1
    hub_module.fetched.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load(address).config == expected.config
    with pytest.raises(CheckpointError, match=r"hf://a/b/c\.pth: is not in the cache(.|\n)*give its path"):
        load("hf://a/b/c.pth")


def test_a_sharded_checkpoint_comes_with_its_parts(hub: Hub, tmp_path: Path) -> None:
    state = load(VIM_LIKE).state_dict()
    halves = {"one.safetensors": sorted(state)[::2], "two.safetensors": sorted(state)[1::2]}
    for name, keys in halves.items():
        save_file({key: state[key] for key in keys}, tmp_path / name)
    index = {"weight_map": {key: name for name, keys in halves.items() for key in keys}}
    hub.put("a/b", {name: (tmp_path / name).read_bytes() for name in halves})
    hub.put("a/b", {"vim_midclstok.index.json": json.dumps(index).encode()})
    found = load("hf://a/b/vim_midclstok.index.json", family="vim", image_size=64)
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://a/missing/c.pth", "there is no repository a/missing, or it is private(.|\n)*ssmprune models list"),
        ("hf://a/b@v9/c.pth", "the repository has no revision v9\nLeave out"),
        ("hf://a/b/c.pth", "the repository has no such file\nFiles there: vim_like.pth"),
        ("hf://a/b", r"hf://a/b/config\.json: the repository has no such file\nFiles there: vim_like\.pth"),
        ("hf://a/gated/c.pth", "accepted its conditions(.|\n)*https://huggingface.co/a/gated"),
        ("hf://a/-b-/c.pth", "is no address of the hub"),
    ],
)
def test_what_is_not_there_is_said_with_what_to_do(hub: Hub, address: str, message: str) -> None:
    hub.put("a/b", {"vim_like.pth": b"x"})
    hub.gated.add("a/gated")
    with pytest.raises(SsmpruneError, match=message):
        load(address)


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SsmpruneError, match=r"pip install 'ssmprune\[hub\]'"):
        load("hf://no/library/c.pth")


def test_loading_a_local_file_does_not_import_huggingface_hub() -> None:
    code = f"import sys, ssmprune_cli; ssmprune_cli.load({str(VIM_LIKE)!r}); print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_recipe_pins_the_file_that_it_was_made_from(hub: Hub, tmp_path: Path) -> None:
    first = hub.put("hustvl/vim", {"vim_like.pth": VIM_LIKE.read_bytes()})
    source = Source(Path("hf://hustvl/vim/vim_like.pth"))
    compress_checkpoint(CompressRequest(source, keep="0.6", out=tmp_path / "out"))
    own, recipe = json.loads((tmp_path / "out/report.json").read_text()), load_recipe(tmp_path / "out/recipe.yaml")
    for provenance in (own["provenance"], recipe.provenance):
        assert provenance["input_address"] == f"hf://hustvl/vim@{first}/vim_like.pth"
        assert provenance["input_sha256"] == hashlib.sha256(VIM_LIKE.read_bytes()).hexdigest()
    head = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---\n")[1])
    assert head["base_model"] == "hustvl/vim" and "model-index" not in head and "datasets" not in head

    state = torch.load(VIM_LIKE, weights_only=False)
    state["model"]["head.bias"] += 1
    torch.save(state, tmp_path / "other.pth")
    second = hub.put("hustvl/vim", {"vim_like.pth": (tmp_path / "other.pth").read_bytes()})
    hub_module.fetched.cache_clear()
    again = CompressRequest(source, recipe=str(tmp_path / "out/recipe.yaml"), out=tmp_path / "again")
    with pytest.raises(
        CheckpointError, match=rf"@{second}/vim_like.pth: is another file now(.|\n)*Give hf://.*@{first}"
    ):
        compress_checkpoint(again)
    pinned = Source(Path(recipe.provenance["input_address"]))  # type: ignore[arg-type]
    compress_checkpoint(CompressRequest(pinned, recipe=str(tmp_path / "out/recipe.yaml"), out=tmp_path / "again"))
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_the_program_reads_addresses_and_has_no_traceback_offline(hub: Hub) -> None:
    hub.put("hustvl/vim", {"vim_like.pth": VIM_LIKE.read_bytes()})

    def run(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ssmprune_cli", "inspect", address, "--json"]
        return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})

    done = run("hf://hustvl/vim/vim_like.pth")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sha256"] == hashlib.sha256(VIM_LIKE.read_bytes()).hexdigest()
    done = run("hf://hustvl/other/vim_like.pth", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: hf://hustvl/other/vim_like.pth: is not in the cache")
    assert "hint: Connect to the network" in done.stderr and "Traceback" not in done.stderr


def test_a_pushed_model_comes_back(hub: Hub, tmp_path: Path) -> None:
    model = ssmprune_cli.load(VIM_LIKE)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), dtype=np.uint8))
    ssmprune_cli.compress(model, keep=0.6, calibration=pixels)
    address = ssmprune_cli.push_to_hub(model, "me/fast", commit_message="First")
    first = hub.commit("me/fast", "main")
    assert address.endswith(first)
    assert set(pushed(hub)) >= {"config.json", "model.safetensors", "README.md", "recipe.yaml"}
    ssmprune_cli.save(model, tmp_path / "saved")
    assert all(pushed(hub)[file.name] == file.read_bytes() for file in (tmp_path / "saved").iterdir())

    found = ssmprune_cli.from_pretrained("me/fast")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(found(images), model(images))
    assert isinstance(found, type(model)) and repr(found) == repr(model)

    ssmprune_cli.restore(model)
    ssmprune_cli.save_pretrained(model, tmp_path / "folder", repo_id="me/fast", push_to_hub=True)
    hub_module.fetched.cache_clear()
    assert ssmprune_cli.from_pretrained("me/fast").pruner is None
    assert ssmprune_cli.from_pretrained("me/fast", revision=first).pruner is not None
    assert ssmprune_cli.from_pretrained(tmp_path / "folder").pruner is None
    with pytest.raises(UsageError, match="a folder has no revisions"):
        ssmprune_cli.from_pretrained(tmp_path / "folder", revision="main")
    with pytest.raises(UsageError, match="private is for an upload"):
        ssmprune_cli.save_pretrained(model, tmp_path / "folder", private=True)
    assert load_file(tmp_path / "folder/model.safetensors").keys() == model.state_dict().keys()


def test_what_a_resized_model_was_before_comes_along(hub: Hub) -> None:
    dense = ssmprune_cli.load(VIM_LIKE)
    small = ssmprune_cli.resize(dense, 48)
    ssmprune_cli.push_to_hub(small, "me/fast", dense=dense)
    source = Source(Path("hf://me/fast")).load()
    assert source.config == dense.config
    assert all(map(torch.equal, source.state_dict().values(), dense.state_dict().values()))


def test_without_a_network_nothing_is_waited_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody listens, huggingface_hub asks again and again, with pauses of half a minute in all."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    with pytest.raises(CheckpointError, match=r"hf://a/b/c\.pth: is not in the cache.*the hub cannot be reached"):
        load("hf://a/b/c.pth")
    assert hub.asked == []
