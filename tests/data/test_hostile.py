"""Images and arrays that are broken or made to do harm: one error of ours, in bounded memory and time."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssmprune_cli.data import batches, fingerprint, open_dataset, some_images
from ssmprune_cli.data.preprocess import to_rgb
from ssmprune_cli.errors import DataError
from ssmprune_cli.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(resize=10, crop=8)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def test_postscript_named_jpg_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(EPS)

    def start(*arguments: object, **options: object) -> None:
        raise AssertionError("started a program")

    monkeypatch.setattr("subprocess.Popen", start)
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read as an image: it is PostScript"):
        some_images(tmp_path, 1, 0).image(0)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"\x00\x00\x00\x18ftypheic\x00", "HEIC"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"\x00\x01\x02", "damaged or of another kind"),
    ],
)
def test_what_an_image_is_instead_is_said(content: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=f"it is {kind}"):
        some_images(tmp_path, 1, 0).image(0)


def test_the_content_decides_and_not_the_suffix(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "a.jpg", format="png")  # ImageNet has such a file
    assert some_images(tmp_path, 1, 0).image(0).size == (3, 2)


@pytest.mark.parametrize("name", ["a.jpg", "a.npz"])
def test_a_pipe_and_a_device_are_not_opened(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="is a pipe, not a file"):
        some_images(tmp_path / name, 1, 0).image(0)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is a device, not a file"):
        some_images(tmp_path / name, 1, 0).image(0)


def test_a_list_and_records_that_are_devices_are_not_read(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "ILSVRC2012_val_00000001.JPEG")
    (tmp_path / "val.txt").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"val\.txt.*is a device, not a file"):
        open_dataset("imagenet", tmp_path)
    (tmp_path / "test_batch.bin").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"test_batch\.bin.*is a device, not a file"):
        open_dataset("cifar10", tmp_path)


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"a\.jpg: there is no such file"):
        some_images(tmp_path, 1, 0).image(0)


def test_folders_deeper_than_python_calls_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):
        Path("d").mkdir()
        os.chdir("d")
    try:
        Image.new("RGB", (3, 2)).save("a.png")
        assert len(some_images(tmp_path, 9, 0)) == 1
    finally:
        Path("a.png").unlink()
        for _ in range(1100):  # pytest's own way to remove them calls itself for each
            os.chdir("..")
            Path("d").rmdir()


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 70_000), ("I", -1)])
def test_pixels_of_unknown_range_are_refused_by_name(mode: str, value: float, tmp_path: Path) -> None:
    Image.new(mode, (12, 12), value).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"a\.tiff: cannot be prepared for the model: its pixels are .* 8"):
        next(batches(some_images(tmp_path, 1, 0), PREPROCESSING, 1))


def test_16_bit_values_fill_the_range() -> None:
    image = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 1, 255]


def test_a_name_that_is_no_utf8_is_shown_and_can_be_told_apart(tmp_path: Path) -> None:
    for number, name in enumerate((b"caf\xe9.png", b"caf\xe8.png")):
        Image.new("RGB", (12, 12), (number, 0, 0)).save(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    dataset = some_images(tmp_path, 9, 0)
    names = [dataset.name(index) for index in range(2)]
    assert names == ["caf\\udce8.png", "caf\\udce9.png"]
    assert len(fingerprint(dataset)) == 64 and len(next(batches(dataset, PREPROCESSING, 2)).names) == 2


# npz


def header(shape: str, descr: str = "'|u1'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def archive(path: Path, content: bytes, *, packed: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as file:
        file.writestr("images.npy", content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("(1099511627776, 8, 8)") + bytes(64), "more than the file has"),
        (header("(-1, 8, 8)"), "cannot be read|damaged"),
        (header("(1, 8, 8)", "'|O'") + bytes(64), "holds object"),
        (header("(1, 8, 8)", "'<U16'") + bytes(64), "holds <U16"),
        (header("(1, 8, 8)", "[('a', '<i4'), ('b', '<U2000000000')]"), "not numbers|cannot be read"),
        (header("(" + "(" * 5000), "cannot be read"),
        (header("(9, 9)")[:20], "cannot be read"),
        (b"\x93NUMPY\x09\x09", "cannot be read"),
        (b"\xff" * 100, "cannot be read"),
    ],
)
def test_an_array_is_judged_by_its_header(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset("npz", archive(tmp_path / "a.npz", content))


def test_an_array_that_unpacks_to_very_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = header("(32, 256, 256)") + bytes(1 << 21)
    path = archive(tmp_path / "a.npz", content, packed=True)
    assert len(open_dataset("npz", path)) == 32
    monkeypatch.setattr("ssmprune_cli.data.npz._MOST_BYTES", 1 << 20)  # in place of a gigabyte
    with pytest.raises(DataError, match=r"2,097,152 bytes, packed in"):
        open_dataset("npz", path)
    assert len(open_dataset("npz", archive(path, content))) == 32  # what is not packed has the size that it seems


def test_a_way_of_packing_that_may_need_gigabytes_is_refused(tmp_path: Path) -> None:
    """LZMA says itself how much memory it takes."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("images.npy", header("(1, 8, 8)") + bytes(64))
    with pytest.raises(DataError, match="packed in a way that NumPy does not use"):
        open_dataset("npz", tmp_path / "a.npz")


def test_sizes_that_an_archive_makes_up_are_not_believed(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", header("(65000, 256, 256)") + bytes(64))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = struct.pack("<II", 4_294_967_000, 4_294_967_000)  # packed, and unpacked
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"4,259,840,000 bytes, packed in \d{3}: too many"):
        open_dataset("npz", path)


def test_an_encrypted_archive_is_named(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", header("(1, 8, 8)") + bytes(64))
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is encrypted"):
        open_dataset("npz", path)


def test_an_image_of_an_array_has_a_limit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)
    with pytest.raises(DataError, match="8 x 8 pixels are more than the limit of 63"):
        open_dataset("npz", archive(tmp_path / "a.npz", header("(1, 8, 8)") + bytes(64)))


def test_memory_that_runs_out_is_an_error_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (12, 12)).save(tmp_path / "a.png")

    def none_left(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.Image.Image.resize", none_left)
    with pytest.raises(DataError, match=r"a\.png: cannot be prepared for the model: there is not enough memory"):
        next(batches(some_images(tmp_path, 1, 0), PREPROCESSING, 1))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", none_left)
    with pytest.raises(DataError, match=r"a\.png: cannot be read as an image: there is not enough memory"):
        some_images(tmp_path, 1, 0).image(0)


def test_messages_show_control_characters_and_are_cut(tmp_path: Path) -> None:
    name = "\x1b[31mred\n.npz"
    buffer = io.BytesIO()
    np.savez(buffer, **{f"{'x' * 2000}\x07": np.zeros(1)})  # type: ignore[arg-type]
    (tmp_path / name).write_bytes(buffer.getvalue())
    with pytest.raises(DataError) as caught:
        open_dataset("npz", tmp_path / name)
    text = str(caught.value)
    assert "\\x1b[31mred\\n.npz" in text and "\x1b" not in text and "\x07" not in text and len(text) < 1500


def test_a_photograph_with_a_second_picture_in_it_is_read(tmp_path: Path) -> None:
    """As telephones write .jpg: Multi-Picture Format."""
    first, second = (Image.new("RGB", (12, 10), colour) for colour in ("white", "black"))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert some_images(tmp_path, 1, 0).image(0).getpixel((0, 0)) == (255, 255, 255)
