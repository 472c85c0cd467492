"""Clips: which frames and squares of them a model is given, folders and videos, layouts, and what is refused."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ssmprune_cli.data import batches, fingerprint, open_dataset
from ssmprune_cli.data.clips import Clips, find_clips, frame_files, prepare_clip, sampled, some_clips
from ssmprune_cli.data.resize import resize_linear
from ssmprune_cli.errors import DataError
from ssmprune_cli.preprocessing import ClipPreprocessing, Preprocessing

WAY = ClipPreprocessing(8, 8, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), frames=3)
Pixels = NDArray[np.uint8]


def frames_of(count: int, seed: int = 0, size: tuple[int, int] = (10, 14)) -> list[Pixels]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8))


def folder_clip(folder: Path, frames: list[Pixels]) -> Path:
    """Frames with numbers that are not filled up with zeros: 10 comes after 2."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(folder / f"img_{number}.png")
    return folder


def video(path: Path, count: int, *, top: int | None = None, codec: dict[str, str] | None = None) -> Path:
    """A video whose frame number n is grey of level 20 n, its upper half of level `top`. An .mp4 says first what it
    holds."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream("mpeg4", rate=10, options=codec or {})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in range(count):
            grey = np.full((48, 64, 3), 20 * number % 256, np.uint8)
            if top is not None:
                grey[:24] = top
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


# --- which frames


@pytest.mark.parametrize(("total", "frames", "segments"), [(300, 8, 4), (9, 8, 1), (8, 8, 3), (3, 8, 2), (1, 16, 4)])
def test_frames_are_those_that_the_authors_take(total: int, frames: int, segments: int) -> None:
    """By NumPy, as `_get_seq_frames` of their Kinetics_sparse has it."""
    size = max(0.0, float(total - 1) / frames)
    expected = []
    for segment in range(segments):
        for number in range(frames):
            start = int(np.round(size * number))
            expected.append(min(start + int(size / (segments + 1) * (segment + 1)), total - 1))
    assert sampled(total, frames, segments) == expected


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = folder_clip(tmp_path / "clip", frames_of(11))
    (folder / "notes.txt").touch()
    assert [int(path.stem[4:]) for path in frame_files(folder)] == list(range(1, 12))


def test_a_clip_is_its_frames_scaled_cut_and_normalised(tmp_path: Path) -> None:
    frames = frames_of(11)
    dataset = Clips(tmp_path, [folder_clip(tmp_path / "clip", frames)], [4])
    (batch,) = batches(dataset, WAY, 4)
    assert batch.images.shape == (1, 3, 3, 8, 8) and batch.targets == (4,) and batch.names == ("clip",)
    for moment, number in enumerate(sampled(11, 3, 1)):
        scaled = resize_linear(frames[number], 8, 11)[:, 1:9]  # of 3 columns too many, 1 goes before
        expected = torch.from_numpy(scaled.transpose(2, 0, 1).astype(np.float32) / 255 - 0.5) / 0.5
        torch.testing.assert_close(batch.images[0, :, moment], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tall", [False, True])
def test_views_are_segments_by_crops_along_the_long_side(tall: bool) -> None:
    """The authors' starts: int(crop * (long - short) / (crops - 1))."""
    size = (13, 8) if tall else (8, 13)
    frames = [Image.fromarray(frame) for frame in frames_of(6, size=size)]
    way = ClipPreprocessing(8, 8, "bilinear", (0.0,) * 3, (1.0,) * 3, frames=3, segments=2, crops=3)
    views = prepare_clip(frames, way)
    assert views.shape == (6, 3, 3, 8, 8)
    for segment in range(2):
        for crop, start in enumerate((0, 2, 5)):
            for moment in range(3):
                pixels = np.asarray(frames[3 * segment + moment]).transpose(2, 0, 1)
                square = pixels[:, start : start + 8] if tall else pixels[:, :, start : start + 8]
                expected = torch.from_numpy(square.astype(np.float32) / 255)
                assert torch.equal(views[3 * segment + crop, :, moment], expected)


def test_too_few_frames_are_repeated_and_it_is_said(tmp_path: Path) -> None:
    dataset = Clips(tmp_path, [folder_clip(tmp_path / "short", frames_of(2))], [0])
    (batch,) = batches(dataset, WAY, 1)
    assert torch.equal(batch.images[0, :, 0], batch.images[0, :, 1])
    list(batches(dataset, replace(WAY, frames=2), 1))
    assert dataset.notes == ("1 clip has fewer than 3 frames, so frames were repeated: short (2).",)


# --- videos


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
def test_a_video_gives_the_frames_that_are_asked_for(suffix: str, tmp_path: Path) -> None:
    dataset = some_clips(video(tmp_path / f"grey{suffix}", 11), 1, seed=0)
    (batch,) = batches(dataset, WAY, 1)
    levels = (batch.images[0].mean(dim=(0, 2, 3)) * 0.5 + 0.5) * 255
    expected = torch.tensor([20.0 * number for number in sampled(11, 3, 1)])
    torch.testing.assert_close(levels, expected, rtol=0, atol=6.0)  # the code is lossy


def test_a_damaged_video_is_an_error_that_names_it(tmp_path: Path) -> None:
    whole = video(tmp_path / "whole.avi", 12).read_bytes()
    for name, content in (("cut.avi", whole[: len(whole) // 8]), ("empty.mp4", b""), ("text.mp4", b"no video\n" * 99)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: (cannot be read as a video|is empty)"):
            list(batches(some_clips(tmp_path / name, 1, seed=0), WAY, 1))


@pytest.mark.parametrize(
    ("suffix", "pictures", "message"),
    [
        (".mp4", b"mdat", "a part of it is missing"),
        (".avi", b"movi", "(a part of it is missing|it ends after)"),
        (".mkv", b"\x1f\x43\xb6\x75", r"it ends after \d\.\d of 6\.0 seconds"),
    ],
)
def test_a_video_that_was_cut_off_is_not_read_as_a_shorter_one(
    suffix: str, pictures: bytes, message: str, tmp_path: Path
) -> None:
    content = video(tmp_path / f"whole{suffix}", 60).read_bytes()
    start = content.index(pictures)
    (tmp_path / f"cut{suffix}").write_bytes(content[: start + (len(content) - start) // 2])
    with pytest.raises(DataError, match=rf"cut.*: cannot be read as a video: {message}"):
        list(batches(some_clips(tmp_path / f"cut{suffix}", 1, seed=0), WAY, 1))


def test_a_damaged_frame_is_an_error(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", 12)
    content = bytearray(path.read_bytes())
    place = content.index(b"mdat") + 60
    content[place : place + 40] = bytes(value ^ 0x5A for value in content[place : place + 40])
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"frame 1 is damaged"):
        list(batches(some_clips(path, 1, seed=0), WAY, 1))


def test_frames_that_a_cut_left_out_of_view_are_not_counted(tmp_path: Path) -> None:
    """Of a video that was cut without coding it again, not at a key frame: its first frames show nothing."""
    av = pytest.importorskip("av")
    whole, cut = video(tmp_path / "whole.mp4", 12, codec={"g": "6", "bf": "2"}), tmp_path / "cut.mkv"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None and packet.pts * packet.time_base >= 0.4:
                packet.stream = stream
                container.mux(packet)
    with av.open(str(cut)) as container:
        seen = [float(frame.to_ndarray(format="gray").mean()) for frame in container.decode(video=0)]
        assert len(seen) < 8, "as it is cut, some show nothing"
    dataset = some_clips(cut, 1, seed=0)
    (batch,) = batches(dataset, WAY, 1)
    levels = (batch.images[0].mean(dim=(0, 2, 3)) * 0.5 + 0.5) * 255
    first = 12 - len(seen)
    expected = torch.tensor([20.0 * (first + number) for number in sampled(len(seen), 3, 1)])
    torch.testing.assert_close(levels, expected, rtol=0, atol=6.0)


def test_a_video_of_a_turned_telephone_is_upright(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", 2, top=250)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44  # of the track, from its coordinates to those of the screen
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    upright = np.asarray(some_clips(path, 1, seed=0).image(0).convert("L")).astype(int)
    assert upright.shape == (64, 48)
    assert upright[:, 32:].min() > 200 and upright[:, :16].max() < 60, "what was at the top is on the right"


def test_a_playlist_under_another_name_opens_nothing(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "secret.ts").write_bytes(b"G" * 188)
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path / 'secret.ts'}\n#EXT-X-ENDLIST\n")
    with pytest.raises(DataError, match="cannot be read as a video"):
        list(batches(some_clips(tmp_path / "list.mp4", 1, seed=0), WAY, 1))


def test_without_pyav_a_video_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match="PyAV, which reads videos, is not installed") as caught:
        list(batches(some_clips(tmp_path / "a.mp4", 1, seed=0), WAY, 1))
    assert "ssmprune[video]" in (caught.value.hint or "")


# --- folders and lists


def test_clips_are_found_in_a_tree(tmp_path: Path) -> None:
    folder_clip(tmp_path / "b" / "clip", frames_of(2))
    folder_clip(tmp_path / "a", frames_of(2))
    (tmp_path / "c.mp4").touch()
    (tmp_path / "d.xyz").touch()
    found, left_out = find_clips(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a", "b/clip", "c.mp4"]
    assert left_out == {".xyz": 1}
    assert len(some_clips(tmp_path, 2, seed=0)) == 2


def test_a_fingerprint_is_of_all_frames(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder_clip(tmp_path / name / "clip", frames_of(5))
    one, two = (some_clips(tmp_path / name, 9, seed=0) for name in ("one", "two"))
    assert fingerprint(one) == fingerprint(two)
    last = tmp_path / "two" / "clip" / "img_5.png"
    Image.fromarray(frames_of(1, seed=3)[0]).save(last)
    assert fingerprint(one) != fingerprint(two)


def test_kinetics_as_a_list(tmp_path: Path) -> None:
    folder_clip(tmp_path / "clips" / "with space", frames_of(3))
    folder_clip(tmp_path / "clips" / "b", frames_of(3))
    (tmp_path / "val.csv").write_text("clips/with space,7\n\nclips/b 2\n")
    dataset = open_dataset("kinetics", tmp_path)
    assert [dataset.target(index) for index in range(2)] == [7, 2]
    assert [dataset.name(index) for index in range(2)] == ["clips/with space", "clips/b"]
    assert dataset.class_names == () and dataset.clips


@pytest.mark.parametrize("inside", ["", "val", "test"])
def test_kinetics_as_class_folders(inside: str, tmp_path: Path) -> None:
    for name, count in (("archery", 2), ("bowling", 1)):
        for number in range(count):
            folder_clip(tmp_path / inside / name / f"clip{number}", frames_of(2))
    dataset = open_dataset("kinetics", tmp_path)
    assert [dataset.target(index) for index in range(3)] == [0, 0, 1]
    assert dataset.class_names == ("archery", "bowling")


def photos(folder: Path) -> None:
    """A folder of images for each class, as image classifiers are judged on."""
    for name in ("cat", "dog"):
        folder_clip(folder / name, frames_of(2))


def mixed(folder: Path) -> None:
    folder_clip(folder / "clip", frames_of(2))
    Image.fromarray(frames_of(1)[0]).save(folder / "thumbnail.png")


def sizes(folder: Path) -> None:
    folder_clip(folder / "clip", [*frames_of(1), *frames_of(1, size=(9, 14)), *frames_of(1)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "has no clips$"),
        (lambda folder: (folder / "empty").mkdir(), "has no clips$"),
        (lambda folder: (folder / "a.xyz").touch(), "has no clips, only 1 .xyz"),
        (mixed, "holds images, and clip too: it is one clip, or its folders and videos are"),
        (sizes, "its frames have different sizes: img_1.png 14 x 10, img_2.png 14 x 9 pixels"),
    ],
)
def test_folders_that_hold_no_clips_are_refused(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        list(batches(some_clips(tmp_path, 9, seed=0), WAY, 1))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("clip", "val.csv, line 1: is not a path and a label: 'clip'"),
        ("clip,1\nclip,cat", "val.csv, line 2: is not a path and a label"),
        ("clip,-1", "line 1: is not a path and a label"),
        ("clip,99999999999999999999", "line 1: is not a path and a label"),
        ("gone.mp4,1", "line 1: there is no such clip: gone.mp4"),
        ("val.csv,1", "line 1: is neither a video nor a folder of frames: val.csv"),
        ("\n\n", "lists no clips"),
    ],
)
def test_lists_that_cannot_be_read_are_refused(lines: str, message: str, tmp_path: Path) -> None:
    folder_clip(tmp_path / "clip", frames_of(2))
    (tmp_path / "val.csv").write_text(lines)
    with pytest.raises(DataError, match=message):
        open_dataset("kinetics", tmp_path)


def test_images_are_no_clips_and_clips_no_images(tmp_path: Path) -> None:
    photos(tmp_path)
    with pytest.raises(DataError, match="cat: has images in it, where a class folder has clips"):
        open_dataset("kinetics", tmp_path)
    with pytest.raises(DataError, match="these are images, and the model takes clips"):
        list(batches(open_dataset("imagefolder", tmp_path), WAY, 1))
    with pytest.raises(DataError, match="these are clips, and the model takes images"):
        list(batches(some_clips(tmp_path, 9, seed=0), Preprocessing(8, 8), 1))
