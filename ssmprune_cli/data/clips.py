"""Clips: folders of frames and video files, of which a model of clips is given some frames, at even distances.

Which frames and squares, and how they are scaled, as OpenGVLab/VideoMamba f3427e4 does it (videomamba/video_sm,
`Kinetics_sparse`): T moments divide a clip evenly; of S segments, segment s begins s + 1 parts of S + 1 of their
distance later. A clip of fewer frames gives some of them more than once. The frames of a folder are in the order of the
numbers in their names. (On Something-Something the authors sample otherwise.)
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssmprune_cli.data.datasets import ImageDataset, ImageFiles, chosen, unprepared
from ssmprune_cli.data.files import IMAGE_SUFFIXES, by_number, check_folder, counted, entries, subfolders
from ssmprune_cli.data.image_file import check_pixels, read_image
from ssmprune_cli.data.preprocess import center_crop, normalised, resize_short_side, to_rgb
from ssmprune_cli.data.resize import resize_linear
from ssmprune_cli.data.video_file import VIDEO_SUFFIXES, read_video
from ssmprune_cli.errors import DataError, listing
from ssmprune_cli.preprocessing import ClipPreprocessing, Frame, Preparation

_PIECE = 1 << 20  # bytes of a file that are read at once


class Clips(ImageFiles):
    """Clips below `root`: each file of `files` is a folder of frames or a video. `labels` as in ImageFiles."""

    clips = True

    def __init__(
        self,
        root: Path,
        files: Sequence[Path],
        labels: Sequence[int] | None,
        class_names: Iterable[str] = (),
        notes: Iterable[str] = (),
    ) -> None:
        super().__init__(root, files, labels, class_names, notes)
        self._short: dict[int, dict[int, int]] = {}  # by how many frames were asked for: of each index, how many it has
        self._lock = threading.Lock()

    def image(self, index: int) -> Image.Image:
        """The frame in the middle."""
        ((frame,), _) = _read(self._files[index], lambda total: [total // 2])
        return frame

    def prepared(self, index: int, way: Preparation) -> tuple[Tensor, Frame]:
        assert isinstance(way, ClipPreprocessing)
        frames, total = _read(self._files[index], lambda total: sampled(total, way.frames, way.segments))
        if total < way.frames:
            with self._lock:
                self._short.setdefault(way.frames, {})[index] = total
        size = (frames[0].height, frames[0].width)
        try:
            return prepare_clip(frames, way), Frame(size, (way.crop, way.crop))
        except (ValueError, OSError, MemoryError) as error:
            raise unprepared(error, self.name(index)) from error

    def content(self, index: int) -> bytes:
        """SHA-256 of the bytes of the video, or of the files of all frames."""
        path = self._files[index]
        digest = hashlib.sha256()
        for file in [path] if not path.is_dir() else frame_files(path):
            try:
                with file.open("rb") as stream:
                    while piece := stream.read(_PIECE):
                        digest.update(piece)
            except OSError as error:
                raise DataError(f"cannot be read: {error.strerror or error}", where=str(file)) from error
        return digest.digest()

    @property
    def notes(self) -> tuple[str, ...]:
        """As elsewhere, and of the clips that were read, which had too few frames."""
        with self._lock:
            short = {wanted: sorted(clips.items()) for wanted, clips in sorted(self._short.items())}
        notes = list(self._notes)
        for wanted, clips in short.items():
            names = listing(f"{self.name(index)} ({total})" for index, total in clips)
            some = "1 clip has" if len(clips) == 1 else f"{len(clips)} clips have"
            notes.append(f"{some} fewer than {wanted} frames, so frames were repeated: {names}.")
        return tuple(notes)


def sampled(total: int, frames: int, segments: int) -> list[int]:
    """The positions of `frames` among `total` frames, for each of `segments` in turn."""
    distance = (total - 1) / frames
    starts = [int(distance / (segments + 1) * (segment + 1)) for segment in range(segments)]
    return [min(round(distance * moment) + start, total - 1) for start in starts for moment in range(frames)]


def frame_files(folder: Path) -> list[Path]:
    """The frames in `folder`, in the order of the numbers in their names. DataError if there are none."""
    files = [path for path in entries(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise DataError("has no frames: a clip is a folder of images, or a video file", where=str(folder))
    return sorted(files, key=lambda path: by_number(path.name))


def _read(path: Path, choose: Callable[[int], Sequence[int]]) -> tuple[list[Image.Image], int]:
    """The frames at the positions that `choose` gives for their number, and that number."""
    if not path.is_dir():
        return read_video(path, choose)
    files = frame_files(path)
    positions = choose(len(files))
    found = {position: read_image(files[position]) for position in set(positions)}
    first = min(found)
    for position, frame in sorted(found.items()):
        if frame.size != found[first].size:
            sizes = (f"{found[each].width} x {found[each].height}" for each in (first, position))
            raise DataError(
                f"its frames have different sizes: {files[first].name} {next(sizes)}, {files[position].name} "
                f"{next(sizes)} pixels",
                where=str(path),
                hint="A folder of images is one clip here. Of photos that belong to no video, none can be made.",
            )
    return [found[position] for position in positions], len(files)


def prepare_clip(frames: Sequence[Image.Image], way: ClipPreprocessing) -> Tensor:
    """What a model is given of the frames of all segments: (3, T, H, W); with several views (views, 3, T, H, W),
    segment by segment, and in each from one end of the frames' long side to the other.

    Raises ValueError for a frame that cannot be converted.
    """
    scaled = [_scaled(to_rgb(frame), way) for frame in frames]
    views = []
    for start in range(0, len(scaled), way.frames):
        for crop in range(way.crops):
            squares = [normalised(_square(frame, crop, way), way) for frame in scaled[start : start + way.frames]]
            views.append(np.stack(squares, axis=1))  # (3, T, H, W)
    return torch.from_numpy(views[0] if len(views) == 1 else np.stack(views))


def _scaled(image: Image.Image, way: ClipPreprocessing) -> Image.Image:
    """Its short side `way.resize` pixels. Bilinear is cv2's, which the authors use: Pillow's would smooth."""
    side = way.resize
    if way.interpolation != "bilinear":
        return resize_short_side(image, side, way.interpolation)
    height, width = (side, int(side * image.width / image.height))
    if image.width < image.height:
        height, width = int(side * image.height / image.width), side
    check_pixels(height, width)
    return Image.fromarray(resize_linear(np.asarray(image), height, width))


def _square(image: Image.Image, crop: int, way: ClipPreprocessing) -> Image.Image:
    """The square number `crop` of `way.crops`, of which one alone is in the middle; then its own middle."""
    room = max(image.size) - way.resize
    start = int(room / 2) if way.crops == 1 else int(crop * room / (way.crops - 1))
    left, top = (start, 0) if image.width > image.height else (0, start)
    return center_crop(image.crop((left, top, left + way.resize, top + way.resize)), way.crop)


def is_clip(path: Path) -> bool:
    """Whether `path` is a video file or a folder with frames in it."""
    if path.is_dir():
        return any(each.suffix.lower() in IMAGE_SUFFIXES for each in entries(path))
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_clips(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Every clip in `folder` and below, by path, and how many other files there are, by suffix. A folder with frames is
    one clip; links to folders above are not followed. Raises DataError for one that has folders or videos too."""
    clips: list[Path] = []
    left_out: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        if is_clip(here):
            others = [path for path in entries(here) if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES]
            if others:
                raise DataError(
                    f"holds images, and {others[0].name} too: it is one clip, or its folders and videos are",
                    where=str(here),
                    hint="Give the folder of one clip, or move the images elsewhere.",
                )
            clips.append(here)
            continue
        waiting += subfolders(here)
        for path in entries(here):
            if not path.is_dir():
                if is_clip(path):
                    clips.append(path)
                else:
                    left_out[path.suffix.lower() or "without a suffix"] += 1
    return sorted(clips, key=lambda path: path.relative_to(folder).parts), left_out


def some_clips(path: Path, count: int, seed: int) -> ImageDataset:
    """`count` clips of `path`, chosen by `seed`: a clip, or a folder with clips in it or below it. All of them if there
    are fewer. Raises DataError if there are none."""
    if path.exists() and not path.is_dir() and not is_clip(path):
        raise DataError(
            "is no clip, and the model takes clips",
            where=str(path),
            hint=f"A clip is a folder of frames, or a video ({', '.join(sorted(VIDEO_SUFFIXES))}).",
        )
    if path.exists() and not path.is_dir():
        return Clips(path.parent, [path], labels=None)
    check_folder(path)
    found, left_out = find_clips(path)
    if not found:
        held = counted(left_out)
        raise DataError(f"has no clips{held and f', only {held}'}", where=str(path))
    root = path if found != [path] else path.parent
    return chosen(Clips(root, found, labels=None), count, seed)


def listed_clips(files: Sequence[Path]) -> ImageDataset:
    """These clips, in this order. Raises DataError if one of them is missing or is no clip."""
    for file in files:
        if not os.path.lexists(file):
            raise DataError("there is no such clip", where=str(file))
        if not is_clip(file):
            raise DataError("is no clip: neither a video nor a folder of frames", where=str(file))
    root = Path(os.path.commonpath([file.absolute().parent for file in files]))
    return Clips(root, [file.absolute() for file in files], labels=None)
