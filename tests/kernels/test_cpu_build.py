"""How the C kernels are built and kept, and the levels that there are."""

@needs_compiler
def test_the_library_is_compiled_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load_library()
    (library,) = (tmp_path / "ssmprune").iterdir()  # no half-written file stays behind
    written = library.stat().st_mtime_ns
    build.load_library()
    assert library.stat().st_mtime_ns == written


@needs_compiler
def test_a_failing_compiler_is_named_with_its_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(build.LEVELS, build.level(), ("-march=no-such-processor",))
    reason = CpuBackend().missing()
    assert reason is not None and "failed: " in reason and "no-such-processor" in reason
    assert not list((tmp_path / "ssmprune").iterdir())


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ("fpu sse2", "x86-64"),
        ("sse2 avx avx2 bmi2 f16c fma", "x86-64-v3"),
        ("sse2 avx avx2 bmi2 f16c fma avx512f", "x86-64-v3"),  # AVX-512 in part is not v4
        ("sse2 avx2 bmi2 f16c fma avx512f avx512bw avx512cd avx512dq avx512vl", "x86-64-v4"),
    ],
)
def test_the_instruction_set_is_one_that_the_processor_has(
    flags: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", lambda self: f"model name\t: X\nflags\t\t: {flags}\nbugs\t:\n")
    assert build.level() == level
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert build.level() == "baseline"
