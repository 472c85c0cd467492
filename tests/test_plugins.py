"""Model families that installed packages add: real packages in a folder on the path, and the real program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models import FAMILIES, Family, Hints
from ssmprune_cli.models.plugins import add_plugins
from ssmprune_cli.plugins import GROUP, Plugin, PluginWarning, family_plugins
from ssmprune_cli.registry import Registry

ROOT = Path(__file__).parents[1]
RECORD = """
from ssmprune_cli.models import Family, ImageConfig
RECORD = Family("{name}", "T", {matches}, None, None, {config}, None, {variants}, None, None)
"""


def example() -> str:
    """The package of docs/extending/family.md."""
    page = (ROOT / "docs" / "extending" / "family.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    return str(code)


def install(folder: Path, package: str, code: str, entry: str) -> None:
    """What pip leaves of a package: its module, and its metadata beside it."""
    module = package.replace("-", "_")
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(code, encoding="utf-8")
    info = folder / f"{module}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages, of which one is in order."""
    folder = tmp_path_factory.mktemp("site")
    install(folder, "ssmprune-ridge", example(), "ridge = ssmprune_ridge:RIDGE")
    install(folder, "broken-import", "import nothing_of_that_name\n", "broken = broken_import:FAMILY")
    install(folder, "bold-exit", "raise SystemExit(3)\n", "bold = bold_exit:FAMILY")
    install(
        folder,
        "taken-name",
        RECORD.format(name="vim", matches="None", config="ImageConfig", variants={}),
        "vim = taken_name:RECORD",
    )
    install(folder, "no-record", "RECORD = 7\n", "seven = no_record:RECORD")
    return folder


@pytest.fixture(scope="module")
def checkpoint(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of the example, made by its own constructor."""
    folder = tmp_path_factory.mktemp("ridge")
    code = f"""
import torch, ssmprune_ridge as ridge
torch.manual_seed(0)
config = ridge.RidgeConfig(image_size=16, patch_size=4, stride=4, embed_dim=16, depth=3, num_classes=5)
state = ridge.Ridge(config).state_dict()
names = {{name.replace("patch_embed.proj.", "stem."): value for name, value in state.items()}}
torch.save(names, {str(folder / "ridge.pth")!r})
images = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8).numpy()
import numpy
numpy.savez({str(folder / "images.npz")!r}, images=images, labels=numpy.arange(6) % 5)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(site), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "ridge.pth"


def environment(site: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    return {**kept, "NO_COLOR": "1", "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}


def run(site: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ssmprune_cli", *map(str, arguments)]
    return subprocess.run(command, env=environment(site), capture_output=True, text=True, check=False)


def test_inspect_reads_a_file_of_the_package(site: Path, checkpoint: Path) -> None:
    done = run(site, "inspect", checkpoint, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["family"], facts["blocks"], facts["tokens"], facts["scan_directions"]) == ("ridge", 3, 16, 1)
    warnings = done.stderr.splitlines()
    assert len(warnings) == 4, "one for each package that is not in order, and nothing else"
    for package, word in (
        ("bold-exit 1.5", "SystemExit: 3"),
        ("broken-import 1.5", "No module named 'nothing_of_that_name'"),
        ("no-record 1.5", "is a int, and not a Family record"),
        ("taken-name 1.5", "the name is taken"),
    ):
        (line,) = [each for each in warnings if package in each]
        assert line.startswith("warning: ") and word in line


def test_the_commands_take_the_family(site: Path, checkpoint: Path, tmp_path: Path) -> None:
    images = checkpoint.parent / "images.npz"
    out = tmp_path / "fast"
    cheap = ("--reduction", "drop", "--samples", "0", "--batch-size", "1")
    asked = ("--family", "ridge", "--tokens", "8", "--points", "1", "--calib", images)
    done = run(site, "compress", checkpoint, *asked, *cheap, "--out", out)
    assert done.returncode == 0, done.stderr
    done = run(site, "eval", out, "--dataset", "npz", "--data", images, "--compare", checkpoint, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["count"] == 6
    done = run(site, "profile", checkpoint, "--batch-size", "1", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    (profile,) = json.loads(done.stdout)["models"]
    assert profile["tokens_per_block"] == [16, 16, 16]


def test_a_name_of_no_family_lists_those_of_packages_too(site: Path, checkpoint: Path) -> None:
    done = run(site, "inspect", checkpoint, "--family", "rigde")
    assert done.returncode == 2
    assert "did you mean 'ridge'?" in done.stderr


def test_without_the_package_its_folder_says_what_is_known() -> None:
    with pytest.raises(UsageError, match="unknown model family 'ridge'"):
        FAMILIES.get("ridge")


def record(name: str = "odd", **fields: object) -> Family:
    """The record of Vim under another name, with other `fields`."""
    vim = FAMILIES.get("vim")
    return replace(vim, **{"name": name, "variants": {}, **fields})  # type: ignore[arg-type]


def registered(monkeypatch: pytest.MonkeyPatch, *plugins: Plugin) -> Registry[Family]:
    families: Registry[Family] = Registry("model family")
    families.register("vim", FAMILIES.get("vim"))
    monkeypatch.setattr("ssmprune_cli.models.plugins.family_plugins", lambda: plugins)
    families.when_read(add_plugins)
    return families


@pytest.mark.parametrize(
    ("name", "fields", "problem"),
    [
        ("odd", {"name": "even"}, "another name, 'even'"),
        ("Odd one", {}, "lower-case"),
        ("odd", {"config_class": dict}, "config_class"),
        ("odd", {"variants": None}, "variants are no dict of configurations"),
        ("odd", {"variants": {"odd_tiny": 3}}, "variants are no dict of configurations"),
        ("odd", {"variants": FAMILIES.get("vim").variants}, "variant vim_.* is another family's"),
    ],
)
def test_a_record_that_does_not_fit_is_left_out(
    name: str, fields: dict[str, object], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = registered(monkeypatch, Plugin(name, "pack 1.0", lambda: record(**fields)))  # type: ignore[arg-type]
    with pytest.warns(PluginWarning, match=problem):
        assert families.names() == ("vim",)
    assert "vim" in families, "asked once, warned once"


def test_of_two_packages_with_one_name_the_first_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = record(title="first"), record(title="second")
    families = registered(monkeypatch, Plugin("odd", "a 1", lambda: first), Plugin("odd", "b 2", lambda: second))
    with pytest.warns(PluginWarning, match=r"package b 2 .* the name is taken"):
        assert families.get("odd").title == "first"


def test_an_error_inside_a_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> object:
        raise KeyError("stem.weight")

    plugin = Plugin("odd", "pack 1.0", lambda: record(matches=fails, configure=fails))
    odd = registered(monkeypatch, plugin).get("odd")
    with pytest.warns(PluginWarning, match=r"pack 1\.0 .* cannot tell whether a file is its own \(KeyError"):
        assert not odd.matches({}, Hints())
    with pytest.raises(CheckpointError, match=r"`configure` of the installed package pack 1\.0 failed: KeyError"):
        odd.configure({}, Hints())


def test_a_package_cannot_change_what_the_families_after_it_are_asked_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def takes(shapes: dict[str, object], _: Hints) -> bool:
        return bool(shapes.pop("head.weight"))

    odd = registered(monkeypatch, Plugin("odd", "pack 1.0", lambda: record(matches=takes))).get("odd")
    shapes = {"head.weight": (1000, 192)}
    assert odd.matches(shapes, Hints()) and "head.weight" in shapes


def test_nothing_is_imported_to_list_names(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    family_plugins.cache_clear()
    try:
        names = [plugin.name for plugin in family_plugins()]
        assert names == ["bold", "broken", "seven", "ridge", "vim"], "by package"
        assert "ssmprune_ridge" not in sys.modules
    finally:
        family_plugins.cache_clear()
