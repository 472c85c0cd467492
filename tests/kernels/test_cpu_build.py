"""How the C kernels are built and kept, and the levels that there are."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import selective_scan, use_backend
from ssmprune_cli.kernels.choice import BACKENDS
from ssmprune_cli.kernels.cpu import build, call, library
from ssmprune_cli.kernels.cpu.backend import CPU, CpuBackend

ROOT = Path(__file__).parents[2]
LEVEL = str(CPU.library.facts().get("level"))
LIBRARY = "" if CPU.library._code is None else CPU.library._code._name
pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C compiler")
Compiler = Callable[[str], Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for compiled kernels, where there are none yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path / "cache" / "ssmprune"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Makes a shell script the compiler, which has all arguments and the last one, the file to write, as $out. Returns
    a file that gets a line at each call."""

    def write(script: str) -> Path:
        log, command = tmp_path / "calls", tmp_path / "compiler"
        command.write_text(f'#!/bin/sh\nfor out; do :; done\necho called >> "{log}"\n{script}\n')
        command.chmod(0o755)
        monkeypatch.setenv("CC", str(command))
        return log

    return write


def calls(log: Path) -> int:
    return log.read_text().count("called") if log.exists() else 0


COPYING = f'cp "{LIBRARY}" "$out"'  # quickly gives what the compiler would


def load() -> Path:
    return Path(build.load_library(LEVEL, call.check_structs)._name)


def test_the_library_is_compiled_once_and_whole_in_a_folder_of_ones_own(cache: Path, fake: Compiler) -> None:
    log = fake(COPYING)
    (path,) = {load(), load()}
    assert path.parent == cache and list(cache.iterdir()) == [path]  # no half-written file stays behind
    assert cache.stat().st_mode & 0o777 == 0o700 and calls(log) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "no library", "another library"])
def test_what_cannot_be_loaded_is_compiled_again(damage: str, cache: Path, fake: Compiler) -> None:
    log = fake(COPYING)
    path = load()
    content = path.read_bytes()
    path.unlink()
    stem = path.name.rpartition("-")[0]
    if damage == "cut":  # to load it would end the process
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        other = b"no library" if damage == "no library" else Path(str(torch._C.__file__)).read_bytes()
        (cache / build.library_name(stem, other)).write_bytes(other)
    for file in cache.iterdir():
        file.chmod(0o755)
    assert load() == path and list(cache.iterdir()) == [path] and calls(log) == 2


@pytest.mark.parametrize("plant", ["folder", "link", "file"])
def test_what_others_can_write_to_is_not_loaded(
    plant: str, tmp_path: Path, cache: Path, fake: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake(COPYING)
    path = load()
    if plant == "folder":
        cache.chmod(0o777)
    elif plant == "link":
        cache.rename(tmp_path / "elsewhere")
        cache.symlink_to(tmp_path / "elsewhere")
    else:
        path.chmod(0o777)
    found = load()
    assert calls(log) == 2
    # A folder that others can write to is left alone; there is another for temporary files.
    assert found.parent == (cache if plant == "file" else tmp_path / f"ssmprune-{os.geteuid()}")
    assert found.stat().st_mode & 0o022 == 0 and found.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(build, "cache_folders", lambda: [cache])
    if plant != "file":
        with pytest.raises(OSError, match="others could put code into"):
            load()


def test_another_users_folder_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    if cache.stat().st_uid == 0:  # root may put code everywhere
        build.secure(cache)
    else:
        with pytest.raises(OSError, match="others could put code into"):
            build.secure(cache)


def test_without_a_home_there_are_temporary_files(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / f"ssmprune-{os.geteuid()}"

    def nobody(_: object) -> None:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", classmethod(nobody))
    for relative in ("", "cache", "."):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert build.cache_folders() == [temporary]


def test_a_folder_that_cannot_be_made_is_no_obstacle(tmp_path: Path, cache: Path, fake: Compiler) -> None:
    cache.parent.write_text("a file")
    fake(COPYING)
    assert load().parent == tmp_path / f"ssmprune-{os.geteuid()}"


def test_a_failing_compiler_is_named_with_its_message(cache: Path, fake: Compiler) -> None:
    log = fake("printf 'caf\\351: error\\nmore\\n' >&2; exit 1")  # in Latin-1
    reason = CpuBackend(LEVEL).missing()
    assert reason is not None and reason.endswith("compiler failed: caf\N{REPLACEMENT CHARACTER}: error")
    assert not list(cache.iterdir()) and calls(log) == len(build.openmp_flags())


def test_a_compiler_has_a_time_limit(cache: Path, fake: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "COMPILER_SECONDS", 0.2)
    fake("sleep 100")
    with pytest.raises(OSError, match=r"took longer than 0\.2 seconds"):
        load()
    assert not list(cache.iterdir())


def test_a_compiler_without_openmp_gives_kernels_for_one_thread(
    cache: Path, fake: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build.compiler()
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))  # quicker to compile
    log = fake(f'case "$*" in *-fopenmp*) echo unsupported option >&2; exit 1; esac\nexec "{real}" "$@"')
    backend = CpuBackend("baseline")
    assert backend.missing() is None and calls(log) == 2
    assert backend.library.facts()["threads"] is False and CPU.library.facts()["threads"] is True
    again = CpuBackend("baseline")
    assert again.missing() is None and calls(log) == 2  # kept like any other
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    u, B = torch.randn(2, 9, 40, generator=generator), torch.randn(2, 9, 5, generator=generator)
    results = []
    for name, own in (("one thread", backend), ("reference", None)):
        if own is not None:
            monkeypatch.setitem(BACKENDS._entries, name, own)
        use_backend(name)
        results.append(selective_scan(u, u, -torch.ones(40, 5), B, B))
    use_backend("auto")
    assert (results[0] - results[1]).abs().max() <= 1e-5 * results[1].abs().max()


def test_where_the_kernels_are_not_built_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(library, "levels", lambda: ("baseline",))
    with pytest.raises(OSError, match="not built on Windows"):
        build.compile_levels(Path())
    assert CpuBackend("baseline").missing() == "the C kernels are not built on Windows"


def test_apples_compiler_takes_pytorchs_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__file__=str(tmp_path / "torch" / "__init__.py")))
    assert build.openmp_flags() == [()]
    runtime = tmp_path / "torch" / "lib" / "libomp.dylib"
    runtime.parent.mkdir(parents=True)
    runtime.touch()
    assert build.openmp_flags() == [("-Xclang", "-fopenmp", str(runtime), f"-Wl,-rpath,{runtime.parent}"), ()]


@pytest.mark.parametrize("struct", call.STRUCTS, ids=lambda struct: struct.__name__)
@pytest.mark.parametrize("change", ["two fields swapped", "a field too many", "another type"])
def test_structs_of_both_sides_are_compared(
    struct: type[ctypes.Structure], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CPU.missing() is None and CPU.library._code is not None
    call.check_structs(CPU.library._code)
    fields = list(struct._fields_)
    if change == "two fields swapped":
        fields[0], fields[1] = fields[1], fields[0]
    elif change == "a field too many":
        fields.append(("more", ctypes.c_int64))
    else:
        fields[-1] = (fields[-1][0], ctypes.c_void_p)
    other = type(struct.__name__, (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(call, "STRUCTS", tuple(other if each is struct else each for each in call.STRUCTS))
    with pytest.raises(OSError, match=rf"another struct {struct.__name__} "):
        call.check_structs(CPU.library._code)


V3 = "sse2 avx avx2 bmi2 f16c fma"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ("fpu sse2", ("baseline",)),
        (V3, ("v3", "baseline")),
        (f"{V3} avx512f amx_tile amx_bf16 avx512_bf16", ("v3", "baseline")),  # AVX-512 in part is not v4
        (V4, ("v4", "v3", "baseline")),
        (f"{V4} amx_tile amx_bf16 avx512_bf16", ("v4+amx", "v4", "v3", "baseline")),
    ],
)
def test_levels_are_those_that_the_processor_has(
    flags: str, levels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", lambda self, **_: f"model name\t: X\nflags\t\t: {flags}\nbugs\t:\n")
    assert build.levels() == levels
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert build.levels() == ("baseline",)


def test_a_level_that_is_asked_for_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.zeros(1)
    for level in [each for each in build.levels() if CpuBackend(each).missing() is None]:
        monkeypatch.setenv("SSMPRUNE_CPU_LEVEL", level)
        backend = CpuBackend()
        assert backend.accepts(tokens, 1) and backend.library.facts()["level"] == level
        assert backend.library.has_tiles() == (level == "v4+amx")
    monkeypatch.setenv("SSMPRUNE_CPU_LEVEL", "")
    assert CpuBackend().library.facts()["level"] == LEVEL
    monkeypatch.setattr(library, "levels", lambda: ("v3", "baseline"))
    for level, reason in (("v4", "the processor does not have it"), ("avx2", "there is no such level")):
        monkeypatch.setenv("SSMPRUNE_CPU_LEVEL", level)
        refused = CpuBackend()
        assert refused.missing() == f"the C kernels cannot run at level {level!r}: {reason}"
        with pytest.raises(KernelError, match=f"{reason}\nSet SSMPRUNE_CPU_LEVEL to one of v3, baseline"):
            refused.accepts(tokens, 1)
        assert not refused.accepts(tokens.double(), 1) and refused.library.facts() == {}


def test_tiles_that_the_system_does_not_allow_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor has them, but the system keeps processes from them."""
    backend = BACKENDS.get("cpu at baseline" if LEVEL != "baseline" else "cpu")
    assert isinstance(backend, CpuBackend) and backend.missing() is None
    monkeypatch.setattr(library, "levels", lambda: ("v4+amx", "v4", "v3", "baseline"))
    monkeypatch.setattr(library, "load_library", lambda *_: backend.library._code)  # without tiles
    best = CpuBackend()
    assert best.library.facts() == {"level": "v4", "processor_has": ["v4+amx", "v4", "v3", "baseline"], "threads": True}
    assert not best.library.has_tiles()
    assert "the system does not let level v4+amx" in str(CpuBackend("v4+amx").missing())


def test_env_shows_levels() -> None:
    command = [sys.executable, "-m", "ssmprune_cli", "env", "--json"]

    def env(level: str) -> dict[str, dict[str, object]]:
        environment = {**os.environ, "SSMPRUNE_CPU_LEVEL": level}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        facts: dict[str, dict[str, object]] = json.loads(done.stdout)
        return facts

    facts = env("baseline")
    assert facts["c_kernels"] == {**CPU.library.facts(), "level": "baseline"} and facts["kernels"]["cpu"] == "available"
    facts = env("v9")
    assert facts["c_kernels"] == {}
    assert facts["kernels"]["cpu"] == "the C kernels cannot run at level 'v9': there is no such level"


def test_a_level_that_cannot_be_is_no_reason_to_run_something_else() -> None:
    code = "import torch; from ssmprune_cli.kernels import active_backend; active_backend()"
    environment = {**os.environ, "SSMPRUNE_CPU_LEVEL": "v9"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "KernelError: the C kernels cannot run at level 'v9'" in done.stderr
