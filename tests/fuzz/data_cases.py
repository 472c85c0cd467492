"""Mutated images, arrays, records and lists: each is read or refused by name, in bounded time and memory.

    python tests/fuzz/data_cases.py [--cases 10000] [--first 0]

runs as many as one likes and prints the counts. A case is a number: the same number is the same mutated file.
"""

from __future__ import annotations

import argparse
import io
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ssmprune_cli.data import batches, fingerprint, open_dataset, some_images
from ssmprune_cli.errors import DataError
from ssmprune_cli.preprocessing import Preprocessing

SEEDS = sorted((Path(__file__).parent / "data_seeds").iterdir())
MOST_SECONDS, MOST_BYTES = 10, 2 << 30
_PREPROCESSING = Preprocessing(resize=10, crop=8)
_WAIT = 120  # seconds, on a busy machine, after which a case hangs
_CHUNK = 250  # cases of one process
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_WORDS = (
    "\N{BYTE ORDER MARK}",
    "\0",
    "\x1b[2J",
    "9" * 5000,
    "-1",
    "1e9",
    "n01443537",
    ",",
    '"',
    "\r",
    "\N{DIGIT ONE}\u0661",
    " ",
)
_HEADERS = (
    b"'shape': (99999999999, 12, 16, 3)",
    b"'shape': (-1, 12, 16, 3)",
    b"'shape': (True, 12, 16)",
    b"'shape': (1.5, 12)",
    b"'shape': " + b"(" * 200,
    b"'descr': '|O'",
    b"'descr': '<f8'",
    b"'descr': '|V999999999'",
    b"'descr': [('a', '|u1')]",
    b"'fortran_order': True",
)


def mutated(content: bytes, suffix: str, draw: random.Random) -> bytes:
    """`content` of a file with this suffix, changed in one to four places."""
    mutators: list[Callable[[bytes, random.Random], bytes]] = [_bits, _number, _cut, _removed, _repeated, _inserted]
    if suffix == ".png":
        mutators += [_png] * 4
    elif suffix == ".npz":
        mutators += [_member] * 6
    elif suffix in {".csv", ".txt", ".json"}:
        mutators += [_word] * 6
    for _ in range(draw.randint(1, 4)):
        content = draw.choice(mutators)(content, draw)
    return content


def _bits(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _number(content: bytes, draw: random.Random) -> bytes:
    """A field of 1, 2 or 4 bytes takes a value at an edge."""
    form = draw.choice(("<I", ">I", "<H", ">H", "B"))
    size = struct.calcsize(form)
    if len(content) < size:
        return content
    at = draw.randrange(min(len(content) - size + 1, draw.choice((64, len(content)))))
    value = draw.choice(_NUMBERS) & ((1 << 8 * size) - 1)
    return content[:at] + struct.pack(form, value) + content[at + size :]


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randint(0, len(content))]


def _span(content: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randint(0, len(content))
    return start, min(len(content), start + draw.choice((1, 4, 16, 256)))


def _removed(content: bytes, draw: random.Random) -> bytes:
    start, stop = _span(content, draw)
    return content[:start] + content[stop:]


def _repeated(content: bytes, draw: random.Random) -> bytes:
    start, stop = _span(content, draw)
    return content[:stop] + content[start:stop] * draw.choice((1, 2, 50)) + content[stop:]


def _inserted(content: bytes, draw: random.Random) -> bytes:
    at = draw.randint(0, len(content))
    return content[:at] + draw.randbytes(draw.choice((1, 4, 64))) + content[at:]


def _word(content: bytes, draw: random.Random) -> bytes:
    at = draw.randint(0, len(content))
    return content[:at] + draw.choice(_WORDS).encode() + content[at:]


def _png(content: bytes, draw: random.Random) -> bytes:
    """A chunk is changed and its checksum made right again, so that what reads it is reached."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return content
    which = draw.randrange(len(chunks))
    kind, data = chunks[which]
    if kind == b"IDAT" and draw.random() < 0.5:
        data = zlib.compress(_bits(zlib.decompress(data), draw)) if len(data) < 1 << 16 and _unpacks(data) else data
    chunks[which] = (kind, draw.choice((_bits, _number, _cut))(data, draw))
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return content[:8] + b"".join(parts)


def _unpacks(data: bytes) -> bool:
    try:
        zlib.decompress(data)
    except zlib.error:
        return False
    return True


def _member(content: bytes, draw: random.Random) -> bytes:
    """An array of an archive is changed, and the archive is whole."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # an earlier mutation broke it
        return content
    if not members:
        return content
    name = draw.choice(sorted(members))
    array = members[name]
    if draw.random() < 0.5:
        header = draw.choice(_HEADERS)
        key = header.split(b":")[0]
        start = array.find(key)
        array = array if start < 0 else array[:start] + header + array[start + len(header) :]
    else:
        array = draw.choice((_bits, _number, _cut, _removed, _inserted))(array, draw)
    members[name] = array
    packing = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for each, value in members.items():
            archive.writestr(each, value)
    return buffer.getvalue()


def run(number: int, folder: Path) -> str:
    """Mutate, write to the empty `folder`, and read: "read" or "refused". Whatever else is raised is a fault."""
    seed = SEEDS[number % len(SEEDS)]
    content = mutated(seed.read_bytes(), seed.suffix, random.Random(number))
    try:
        _read(seed, content, folder)
    except DataError as error:
        text = str(error)
        assert error.where and len(text) < 2000 and text.replace("\n", "").isprintable(), text
        return "refused"
    return "read"


def _read(seed: Path, content: bytes, folder: Path) -> None:
    """As a command does: open, look at every image, prepare it."""
    if seed.suffix in {".csv", ".txt", ".json"}:
        names, kind = ["cat/1.png", "dog/1.png"], "imagefolder"
        if seed.stem not in {"classes", "class_to_idx"}:
            names, kind = [f"val/ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2)], "imagenet"
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes((seed.parent / "rgb.png").read_bytes())
        (folder / seed.name).write_bytes(content)
        dataset = open_dataset(kind, folder)
        _ = dataset.notes, [dataset.target(index) for index in range(len(dataset))]
        return
    path = folder / seed.name
    path.write_bytes(content)
    if seed.suffix == ".bin":
        dataset = open_dataset("cifar10" if seed.stem == "test_batch" else "cifar100", folder)
    elif seed.suffix == ".npz":
        dataset = open_dataset("npz", path)
    else:
        dataset = some_images(path, 1, 0)
    fingerprint(dataset)
    for _ in batches(dataset, _PREPROCESSING, 2):
        pass


def _work(first: int, last: int) -> None:
    """Run cases in this process, a line each: the number before it, the outcome after it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(first, last):
        sys.stdout.write(f"{number} ")
        sys.stdout.flush()
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)  # of computing: ends the process
        signal.alarm(_WAIT)
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(number, Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert peak < MOST_BYTES, f"{peak:,} bytes of memory"
        sys.stdout.write(f"{SEEDS[number % len(SEEDS)].suffix} {outcome}\n")


def main() -> int:
    """Exit code 1 if a case is neither read nor refused."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    first, last = options.first, options.first + options.cases
    if options.worker:
        _work(first, last)
        return 0
    counts: Counter[str] = Counter()
    while first < last:
        stop = min(first + _CHUNK, last)
        command = [sys.executable, "-W", "ignore", __file__, "--worker", f"--first={first}", f"--cases={stop - first}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        *whole, rest = done.stdout.split("\n")
        counts.update(line.split(" ", 1)[1] for line in whole)
        if done.returncode:
            stop = int(rest.split()[0]) + 1 if rest else stop
            counts["FAULTS"] += 1
            sys.stdout.write(f"case {stop - 1} ({SEEDS[(stop - 1) % len(SEEDS)].name}), exit code {done.returncode}:\n")
            sys.stdout.write(done.stderr[-3000:])
        first = stop
    sys.stdout.write("".join(f"{count:8,} {name}\n" for name, count in sorted(counts.items())))
    return int(counts["FAULTS"] > 0)


if __name__ == "__main__":
    sys.exit(main())
