"""The layout is the architecture: imports point down only, and what must be quick stays free of torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ssmprune_cli import checkpoint
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.pruning import Correction, TokenPruner, compress

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ssmprune_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the top down. A module may import from rooms below its own and from its own, unless FORBIDDEN says otherwise.
LAYERS = [
    {"cli", "__main__"},
    {"workflows"},
    {"export", "tasks"},
    {"adapt", "checkpoint", "data", "inference"},
    {"models", "pruning"},
    {"kernels"},
    {"catalogue"},
    {"interface", "recipe", "report", "tokens"},
    {"files", "grids", "plugins", "preprocessing", "registry", "statistics"},
    {"errors"},
]
FORBIDDEN = {
    ("models", "pruning"),
    ("pruning", "models"),
    ("data", "checkpoint"),
    ("export", "tasks"),
    ("tasks", "export"),
}
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
TORCH_FREE = (
    "catalogue",
    "recipe",
    "report",
    "registry",
    "errors",
    "preprocessing",
    "plugins",
    "cli",
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    """The room of a module: its folder, or its own name at the top of the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports anywhere, those for the type checker left out."""
    yield from _imports(ast.parse(path.read_text(encoding="utf-8")).body)


def _imports(nodes: list[ast.stmt]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)
        for field in ("body", "orelse", "finalbody"):
            yield from _imports(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from _imports(handler.body)


def top_level_imports(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from _imports([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.Try)])


@pytest.mark.parametrize("path", [path for path in MODULES if path != PACKAGE / "__init__.py"], ids=name)
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    for target in imports(path):
        parts = target.split(".")
        if parts[0] != "ssmprune_cli" or len(parts) == 1 or parts[1] == "__version__":
            continue
        there = parts[1]
        assert there in LEVEL, f"{target}: give this room a place in LAYERS"
        assert there == here or LEVEL[there] >= LEVEL[here], f"imports {target}, which lies above"
        assert (here, there) not in FORBIDDEN, f"imports {target}"


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) != "cli"], ids=name)
def test_only_cli_talks_to_the_terminal(path: Path) -> None:
    for target in imports(path):
        assert target.split(".")[0] not in {"rich", "typer"}, f"imports {target}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"print", "input", "exit", "quit", "sys.exit", "os._exit"}
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in {"sys.stdout", "sys.stderr"}
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "SystemExit" not in ast.unparse(node.exc)


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) in TORCH_FREE], ids=name)
def test_no_torch_at_import(path: Path) -> None:
    heavy = {"torch", "numpy", "PIL"}
    rooms = {"kernels", "models", "pruning", "checkpoint", "data", "export", "tasks", "workflows", "tokens"}
    for target in top_level_imports(path):
        parts = target.split(".")
        assert parts[0] not in heavy
        assert parts[0] != "ssmprune_cli" or len(parts) == 1 or parts[1] not in rooms


def package(path: Path) -> tuple[str, ...]:
    """The package that a module lies in; its own if it is an `__init__`."""
    return path.relative_to(ROOT).parent.parts


# Each module in these packages is a wing, so that a command imports no more than its own.
STREETS = {("ssmprune_cli",), ("ssmprune_cli", "workflows")}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_wings_export_through_their_init(path: Path) -> None:
    """From outside of a package a module imports what its `__init__` exports, and nothing that lies deeper."""
    here = package(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ssmprune_cli")):
            continue
        parts = tuple(node.module.split("."))
        for length in range(1, len(parts)):
            wing = parts[:length]
            inside = here[:length] == wing
            assert inside or wing in STREETS, f"import from {'.'.join(wing)}, not from {node.module}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=name)
def test_no_module_takes_the_place_of_an_exported_name(path: Path) -> None:
    """A submodule becomes an attribute of its package when it is imported: an export from another one would be lost."""
    rooms = {each.parent.name for each in path.parent.glob("*/__init__.py")}
    modules = {each.stem for each in path.parent.glob("*.py")} | rooms
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                exported = alias.asname or alias.name
                home = (node.module or "").rpartition(".")[2]
                message = f"{exported} comes from {node.module}, and a module here has that name"
                assert exported not in modules or home in (exported, path.parent.name), message


OPS_OF_MODELS = {
    "selective_scan",
    "ssd_scan",
    "causal_conv1d",
    "sparse_conv1d",
    "grid_conv2d",
    "add_rms_norm",
    "gated_sum",
    "EightBit",
    "eight_bit_linear",
    "in_eight_bits",
}


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) == "models"], ids=name)
def test_models_are_op_by_op(path: Path) -> None:
    """How a model is run fast is the business of `inference`."""
    for target in imports(path):
        if target.startswith("ssmprune_cli.kernels"):
            assert target.rpartition(".")[2] in OPS_OF_MODELS, f"imports {target}"
    assert not re.search(r"(?i)\b(fuse|fusing|pack(?!age)|unpack)", path.read_text(encoding="utf-8"))


def test_imports_have_no_circles() -> None:
    """While modules load, none needs one that waits for it."""
    known = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
    needs: dict[str, set[str]] = {}
    for module, path in known.items():
        targets = {target.rpartition(".")[0] if target not in known else target for target in top_level_imports(path)}
        needs[module] = {target for target in targets if target in known} - {module}
    while free := [module for module, wanted in needs.items() if not wanted]:
        for module in free:
            del needs[module]
        for wanted in needs.values():
            wanted.difference_update(free)
    assert not needs, f"these import each other: {', '.join(sorted(needs))}"


def test_packages_named_for_setuptools_are_those_on_disk() -> None:
    """pyproject.toml has to name every package, because recipes/ is mapped into the package."""
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(setup["packages"]) == found | {"ssmprune_cli.recipes"}


def run(code: str) -> str:
    """Standard output of `code` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_package_imports_without_torch_and_offers_the_verbs() -> None:
    assert run("import sys, ssmprune_cli; print('torch' in sys.modules)") == "False\n"
    assert run("import ssmprune_cli as s; print(callable(s.load), callable(s.compress), callable(s.restore))") == (
        "True True True\n"
    )


def test_unknown_attribute_of_the_package_is_an_attribute_error() -> None:
    import ssmprune_cli

    with pytest.raises(AttributeError, match="no attribute 'squash'"):
        _ = ssmprune_cli.squash


def test_every_help_answers_without_torch() -> None:
    """Torch takes seconds to import; walk every command of the app in one interpreter."""
    code = """
import contextlib, io, sys
import typer
from ssmprune_cli.cli.app import app

root = typer.main.get_command(app)

def walk(command, path):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            root.main([*path, "--help"], prog_name="ssmprune")
        except SystemExit as end:
            assert end.code in (0, None), path
    assert "Usage: " + " ".join(["ssmprune", *path]) in text.getvalue(), path
    print(" ".join(path))
    for name, inner in getattr(command, "commands", {}).items():
        walk(inner, [*path, name])

walk(root, [])
print([name for name in ("torch", "numpy", "PIL") if name in sys.modules])
"""
    lines = run(code).splitlines()
    assert lines[-1] == "[]"
    assert {"", "compress", "eval", "inspect", "profile", "env", "recipes list"} <= set(lines)


def test_loading_does_not_import_the_compiler() -> None:
    """It takes two seconds: arithmetic on the meta device imports it."""
    code = """
import sys
from pathlib import Path
import ssmprune_cli
for name in ("vim_like.pth", "plainmamba_like_ema.pth", "vmamba_4d_weights.pth"):
    ssmprune_cli.load(Path("tests/golden/containers", name), image_size=64)
    print(name, "torch._dynamo" in sys.modules)
"""
    assert [line.split()[1] for line in run(code).splitlines()] == ["False"] * 3


def test_loading_a_pruned_and_repaired_model_does_not_either(tmp_path: Path) -> None:
    config = VimConfig(image_size=(32, 32), patch_size=8, stride=8, embed_dim=16, depth=2, d_state=4, num_classes=3)
    model = Vim(config)
    compress(model, 0.5, points=[1], alignment="null")
    assert isinstance(model.pruner, TokenPruner)
    model.pruner.correct(Correction((torch.zeros(3, 16), torch.zeros(3)), {1: torch.zeros(16, 16)}))
    checkpoint.save(tmp_path / "vim", model)
    code = f"""
import sys
import ssmprune_cli
print(ssmprune_cli.load({str(tmp_path / "vim")!r}).pruner.settings.repair, "sympy" in sys.modules)
"""
    assert run(code) == "head+side False\n"


def test_no_model_needs_it_to_be_built_without_weights() -> None:
    code = """
import sys
from dataclasses import asdict
from pathlib import Path
from ssmprune_cli.checkpoint import described
from ssmprune_cli.checkpoint.described import unfilled
from ssmprune_cli.models import FAMILIES
for name, family in FAMILIES.items():
    unfilled(family, next(iter(family.variants.values())), None, Path())
    print(name, "sympy" in sys.modules, "torch._dynamo" in sys.modules)
sizes = {"image_size": [32, 32], "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 2, "num_classes": 3}
model = described("vim", sizes, None, Path("tests/golden/containers/vim_like.pth"))
print(model.parameter_count, "sympy" in sys.modules)
"""
    lines = [line.split()[1:] for line in run(code).splitlines()]
    assert len(lines) > 10 and lines == [["False", "False"]] * (len(lines) - 1) + [["False"]]
