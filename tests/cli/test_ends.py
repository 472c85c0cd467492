"""How runs end: signals, memory, streams that are full or closed, peers that do not answer; and what help there is."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ssmprune_cli.cli import output
from ssmprune_cli.errors import SsmpruneError
from tests.cli.conftest import Run, Start

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "golden" / "containers" / "vim_like.pth"


def run_main(body: str) -> subprocess.CompletedProcess[str]:
    """Run main() with a command `fail` whose body is given."""
    code = f"""
import os, signal, sys, time
from pathlib import Path
from ssmprune_cli.cli.app import app
from ssmprune_cli.cli.main import main
@app.command()
def fail() -> None:
    {body}
sys.argv = ["ssmprune", "fail"]
main()
"""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def shell(command: str) -> subprocess.CompletedProcess[str]:
    script = f'set -o pipefail; ssmprune() {{ {sys.executable} -m ssmprune_cli "$@"; }}; {command}'
    return subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


# signals


def test_sigterm_ends_like_ctrl_c_with_its_own_code(tmp_path: Path) -> None:
    file = tmp_path / "temporary"
    done = run_main(
        f"""
    try:
        Path({str(file)!r}).touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    finally:
        Path({str(file)!r}).unlink()
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "error: terminated\n")
    assert not file.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_search_that_is_interrupted_says_how_to_go_on(start: Start, number: signal.Signals, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8))
    state = tmp_path / "out.search-state.json"
    images, out = str(tmp_path / "a.npz"), str(tmp_path / "out")
    command = ["search", str(CHECKPOINT), "--flops", "0.7", "--calib", images, "--out", out]
    process = start(*command, steady=True)
    while not state.exists() and not process.ended():
        time.sleep(0.05)
    os.kill(process.pid, number)
    done = process.wait()
    assert done.returncode == 128 + number, done.stderr
    assert f"kept in {state}. To go on, give the same command again." in done.stderr
    assert done.stderr.endswith("error: interrupted\n" if number == signal.SIGINT else "error: terminated\n")
    assert state.exists() and [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


# memory


@pytest.mark.parametrize(
    "error",
    [
        "MemoryError()",
        'RuntimeError("[enforce fail] DefaultCPUAllocator: can\'t allocate memory: you tried ...")',
        "RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB.')",
    ],
)
def test_memory_that_runs_out_is_no_bug(error: str) -> None:
    done = run_main(f"raise {error}")
    assert done.returncode == 1 and done.stderr.startswith("error: out of memory\nhint: Give a smaller --batch-size")


def test_an_error_of_the_machine_is_no_bug() -> None:
    done = run_main("raise OSError(24, 'Too many open files')")
    assert (done.returncode, done.stderr) == (1, "error: Too many open files\n")


# streams


@pytest.mark.parametrize("command", ["recipes list", "recipes list --json", "recipes show vim_small_topvim", "--help"])
def test_a_full_stdout_is_an_ordinary_error(command: str) -> None:
    done = shell(f"ssmprune {command} > /dev/full")
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stderr and "bug" not in done.stderr and "Exception" not in done.stderr


def test_a_closed_stdout_is_an_ordinary_error() -> None:
    done = shell("ssmprune recipes list >&-")
    assert (done.returncode, done.stderr) == (
        1,
        "error: standard output: is closed, so the result cannot be written\n",
    )


def test_a_closed_stderr_takes_nothing_from_the_result() -> None:
    done = shell("ssmprune recipes list 2>&-")
    assert done.returncode == 0 and "vim_small_topvim" in done.stdout
    assert shell("ssmprune recipes show none 2>&-").returncode == 1


def test_a_reader_that_goes_away_is_no_error_message() -> None:
    done = shell("ssmprune recipes list --json | head -c 1")
    assert (done.stdout, done.stderr) == ("{", "")


@pytest.mark.parametrize("columns", ["0", "-1", "many"])
def test_columns_that_are_none_are_80(ssmprune: Run, columns: str) -> None:
    done = ssmprune("recipes", "list", COLUMNS=columns)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ssmprune("recipes", "list").stdout


def test_long_work_writes_a_line_now_and_then_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with output.progress("Evaluating") as advance:
        for done in range(0, 5001, 100):
            advance(done, 5000)
            now[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Evaluating: 3,000 of 5,000 (60 %), about 20 s left"]
    monkeypatch.setattr(output, "_quiet", True)
    with output.progress("Evaluating") as advance:
        now[0] += 1000
        advance(1, 2)
    assert capsys.readouterr().err == ""


# peers


def alone_of_two(rank: int, port: int) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {
        **kept,
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        **{key: str(value) for key, value in ours.items()},
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


PEER = """
import os, signal, sys
from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.workflows.processes import gathered, join_processes
join_processes("cpu", float(sys.argv[1]))
assert gathered(os.environ["RANK"]) == ["0", "1"]
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), int(sys.argv[2]))
try:
    gathered(1)
except SsmpruneError as error:
    print(error)
    os._exit(1)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_is_killed_or_stopped_is_an_ordinary_error(number: signal.Signals) -> None:
    port = free_port()
    first, second = (
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PEER, "10", str(int(number))],
            cwd=ROOT,
            env=alone_of_two(rank, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    )
    try:
        text, errors = first.communicate(timeout=120)
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 1 and "another process of this work has ended or does not answer" in text, errors
    assert "--peer-timeout" in text


def test_a_peer_that_never_comes_is_waited_for_no_longer_than_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 64, 64), np.uint8), labels=np.zeros(2, int))
    command = ["eval", str(CHECKPOINT), "--dataset", "npz", "--data", str(tmp_path / "a.npz")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "ssmprune_cli", *command, "--peer-timeout", "2"],
        cwd=ROOT,
        env=alone_of_two(0, free_port()),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "does not answer" in done.stderr and "bug" not in done.stderr, done.stderr


def test_a_world_that_is_no_number_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmprune_cli.workflows.processes import join_processes

    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(SsmpruneError, match="WORLD_SIZE is many"):
        join_processes("cpu", 1)


# help and usage


def test_h_is_help_everywhere_and_completion_is_on(ssmprune: Run) -> None:
    for arguments in ((), ("compress",), ("recipes", "show")):
        done = ssmprune(*arguments, "-h")
        assert done.returncode == 0 and done.stdout == ssmprune(*arguments, "--help").stdout
    assert "--install-completion" in ssmprune("-h").stdout
    done = ssmprune(_SSMPRUNE_COMPLETE="complete_bash", COMP_WORDS="ssmprune vis", COMP_CWORD="1")
    assert done.stdout.split() == ["visualize"]


@pytest.mark.parametrize("device", ["mps", "meta", "xpu:0", "gpu"])
def test_a_device_that_is_none_of_ours_is_one_line(ssmprune: Run, device: str) -> None:
    done = ssmprune("profile", CHECKPOINT, "--device", device)
    assert done.returncode == 2 and done.stderr.startswith(f"error: --device: device '{device}' cannot be used: ")
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize(("options", "named"), [((), ".html or .htm"), (("--format", "markdown"), ".md or .markdown")])
def test_a_report_is_no_pdf(ssmprune: Run, options: tuple[str, ...], named: str, tmp_path: Path) -> None:
    done = ssmprune("report", tmp_path, "--out", tmp_path / "x.pdf", *options)
    assert done.returncode == 2 and "error: --out: " in done.stderr and named in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_visualize_replaces_nothing_unasked(ssmprune: Run, tmp_path: Path) -> None:
    (tmp_path / "overview.png").write_bytes(b"mine")
    done = ssmprune("visualize", CHECKPOINT, CHECKPOINT, "--out", tmp_path)
    assert done.returncode == 2 and "error: --out: the folder" in done.stderr and "--overwrite" in done.stderr
    assert (tmp_path / "overview.png").read_bytes() == b"mine"
