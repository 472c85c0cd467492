"""Models of clips in the program: what is said of them, calibration on clips, accuracy by views, refusals."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssmprune_cli.models.mamba.videomamba_clips import VideoMambaClips, VideoMambaClipsConfig

Run = Callable[..., subprocess.CompletedProcess[str]]
IMAGES = Path(__file__).parents[1] / "golden" / "containers" / "vim_like.pth"  # a model of images
CONFIG = VideoMambaClipsConfig((16, 16), 4, 4, embed_dim=16, depth=3, num_classes=6, d_state=4, num_frames=4)


@dataclass(frozen=True)
class Files:
    """A model of clips in its authors' container, and a folder of clips with a list of labels."""

    model: Path
    data: Path

    @property
    def clips(self) -> Path:
        return self.data / "clips"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("video")
    torch.manual_seed(0)
    torch.save({"model": VideoMambaClips(CONFIG).state_dict()}, folder / "videomamba_k400_f4.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (7, 6, 18, 24, 3), dtype=np.uint8)
    lines = []
    for number, frames in enumerate(pixels):
        clip = folder / "data" / "clips" / f"clip{number}"
        clip.mkdir(parents=True)
        for moment, frame in enumerate(frames):
            Image.fromarray(frame).save(clip / f"{moment}.png")
        lines.append(f"clips/clip{number},{number % 6}")
    (folder / "data" / "val.csv").write_text("\n".join(lines))
    return Files(folder / "videomamba_k400_f4.pth", folder / "data")


def test_inspect_names_frames_and_tubelet(ssmprune: Run, files: Files) -> None:
    done = ssmprune("inspect", files.model, "--image-size", "16")
    assert done.returncode == 0, done.stderr
    rows = dict(line.strip("│ \n").split("│")[:2] for line in done.stdout.splitlines() if line.count("│") == 3)
    found = {key.strip(): value.strip() for key, value in rows.items()}
    assert (found["frames"], found["tubelet"], found["num classes"]) == ("4", "1", "6")
    assert found["task"] == "video-classification"
    assert "frames" not in ssmprune("inspect", IMAGES, "--image-size", "64").stdout


def test_accuracy_by_one_view_and_by_several(ssmprune: Run, files: Files) -> None:
    options = ("eval", files.model, "--image-size", "16", "--dataset", "kinetics", "--data", files.data)
    one = ssmprune(*options)
    assert one.returncode == 0, one.stderr
    assert "7 clips, 1 segment x 1 crop, float32" in one.stdout and "clips per second" in one.stdout
    several = ssmprune(*options, "--segments", "2", "--crops", "3", "--json")
    assert several.returncode == 0, several.stderr
    figures = json.loads(several.stdout)
    assert figures["views"] == {"segments": 2, "crops": 3} and figures["count"] == 7
    assert figures["top5"] is not None


def test_compress_calibrates_on_clips_and_judges_them(ssmprune: Run, files: Files, tmp_path: Path) -> None:
    done = ssmprune(
        "compress", files.model, "--image-size", "16", "--calib", files.clips, "--keep", "0.5", "--points", "1",
        "--reduction", "drop", "--data", files.data, "--out", tmp_path / "fast", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["pruned"]["tokens_per_block"] == [65, 33, 33]
    assert report["accuracy"]["count"] == 7 and report["provenance"]["calibration_images"] == 7
    sample = report["samples"][0]
    assert sample["size"] == [4 * 16, 16] and sample["stages"][0]["grid"] == [4 * 4, 4], "frames one below the other"
    assert len(sample["stages"][0]["kept"]) == 32


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("eval", "MODEL", "--dataset", "imagefolder", "--data", "DATA"), 2, "'imagefolder' for video-classification"),
        (
            ("eval", "IMAGES", "--dataset", "kinetics", "--data", "DATA"),
            2,
            "no dataset 'kinetics' for classification",
        ),
        (("compress", "IMAGES", "--keep", "0.5", "--calib", "VIDEOS", "--out", "OUT"), 1, "has no images, only 1 .mp4"),
        (("compress", "MODEL", "--keep", "0.5", "--calib", "EMPTY", "--out", "OUT"), 1, "has no clips"),
        (("compress", "MODEL", "--keep", "0.5", "--calib", "VIDEOS", "--out", "OUT"), 1, "cannot be read as a video"),
        (("compress", "MODEL", "--keep", "0.5", "--reduction", "grid-merge", "--out", "OUT"), 2, "of 4 frames"),
        (("visualize", "MODEL", "CLIPS", "--out", "OUT"), 2, "takes clips, and no pictures of their tokens are drawn"),
        (("finetune", "MODEL", "--data", "DATA", "--out", "OUT"), 2, "cannot be fine-tuned"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_is_refused_in_one_line(
    arguments: tuple[str, ...], code: int, message: str, ssmprune: Run, files: Files, tmp_path: Path
) -> None:
    pytest.importorskip("av")
    for name in ("empty", "videos"):
        (tmp_path / name).mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"no video" * 9)
    places = {
        "MODEL": files.model,
        "IMAGES": IMAGES,
        "DATA": files.data,
        "CLIPS": files.clips,
        "EMPTY": tmp_path / "empty",
        "VIDEOS": tmp_path / "videos",
        "OUT": tmp_path / "out",
    }
    side = "64" if "IMAGES" in arguments else "16"
    done = ssmprune(*(str(places.get(each, each)) for each in arguments), "--image-size", side)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "bug in ssmprune" not in done.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_views_are_for_videos(ssmprune: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 64, 64, 3), np.uint8), labels=np.arange(2))
    options = ("--dataset", "npz", "--data", tmp_path / "images.npz", "--image-size", "64", "--segments", "2")
    done = ssmprune("eval", IMAGES, *options)
    assert done.returncode == 2
    assert "--segments and --crops: are for videos, and the model takes images" in done.stderr
