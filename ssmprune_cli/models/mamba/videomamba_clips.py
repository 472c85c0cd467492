"""VideoMamba for videos: arXiv 2403.06977, OpenGVLab/VideoMamba at f3427e4 (videomamba/video_sm), the authors' names.

VideoMamba's blocks over the patches of all frames of a clip, frame by frame, behind one class token. A *tubelet* is the
frames that one patch spans (`kernel_size`); T counts tubelets. Positions are a sum: of the patch in its frame, and of
the frame in the clip. Letters: B batch, F frames, T tubelets, d model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ssmprune_cli.errors import CheckpointError, DataError, UsageError, listing
from ssmprune_cli.interface import Stage
from ssmprune_cli.models.common import Family, Hints, ImageConfig, Shapes, no_stride, patch_grid
from ssmprune_cli.models.mamba.backbone import embedding
from ssmprune_cli.models.mamba.checkpoint import COMPUTES, fills, mixer_has, read_sizes, resize_positions, shape_of
from ssmprune_cli.models.mamba.videomamba import VideoMamba, VideoMambaConfig
from ssmprune_cli.preprocessing import ClipPreprocessing, Interpolation
from ssmprune_cli.tokens import TokenSequence


@dataclass(frozen=True)
class VideoMambaClipsConfig(VideoMambaConfig):
    """Everything that defines a VideoMamba for videos; see VideoMambaConfig.

    num_frames  that a clip has
    tubelet     frames that one patch spans; 1 in all published models
    """

    num_classes: int = 400
    num_frames: int = 8
    tubelet: int = 1
    eval_crop_ratio: float | None = field(default=1.0, kw_only=True)
    interpolation: Interpolation = field(default="bilinear", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tubelet < 1 or self.num_frames < self.tubelet or self.num_frames % self.tubelet:
            raise UsageError(f"{self.num_frames} frames are no whole number of tubelets of {self.tubelet}")
        if self.stride != self.patch_size:
            raise UsageError(f"the patches of a VideoMamba for videos do not overlap: the stride is {self.patch_size}")

    @property
    def tubelets(self) -> int:
        return self.num_frames // self.tubelet


class ClipEmbed(nn.Module):
    """Clips (B, 3, F, H, W) to embedded patches (B, T, rows * columns, d)."""

    def __init__(self, config: VideoMambaClipsConfig) -> None:
        super().__init__()
        self.input_shape = (3, config.num_frames, *config.image_size)
        rows, columns = patch_grid(config.image_size, config.patch_size, config.stride)
        self.places = rows * columns  # in a frame
        self.grid = (config.tubelets * rows, columns)
        size = (config.tubelet, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.embed_dim, kernel_size=size, stride=size)

    def forward(self, clips: Tensor) -> Tensor:
        if tuple(clips.shape[1:]) != self.input_shape:
            raise DataError(
                f"the model takes clips of shape {self.input_shape}, not {tuple(clips.shape[1:])}",
                hint="A clip is channels, frames, height and width.",
            )
        embedded: Tensor = self.proj(clips)  # (B, d, T, rows, columns)
        return embedded.flatten(3).permute(0, 2, 3, 1)


class VideoMambaClips(VideoMamba):
    """See VideoMambaClipsConfig. `grid` has the frames one below the other."""

    family = "videomamba-clips"
    task = "video-classification"
    tokens = ("cls_token", "pos_embed", "temporal_pos_embedding")
    config: VideoMambaClipsConfig

    def make_patch_embed(self, config: VideoMambaClipsConfig) -> ClipEmbed:
        return ClipEmbed(config)

    def make_tokens(self) -> None:
        config = self.config
        self.cls_token = embedding(1, config.embed_dim)
        self.pos_embed = embedding(1 + self.patch_embed.places, config.embed_dim)
        self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, config.tubelets, config.embed_dim))

    def embed(self, images: Tensor) -> TokenSequence:
        """Clips (B, 3, F, H, W) to the dense sequence: the class token, then frame by frame."""
        patches = self.patch_embed(images) + self.pos_embed[:, 1:]  # (B, T, rows * columns, d)
        patches = (patches + self.temporal_pos_embedding[:, :, None]).flatten(1, 2)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(patches.shape[0], -1, -1)
        return TokenSequence.dense(torch.cat((first, patches), dim=1), self.protected, grid=self.grid)

    @property
    def stages(self) -> tuple[Stage, ...]:
        (stage,) = super().stages
        return (replace(stage, frames=self.config.tubelets),)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (3, self.config.num_frames, *self.image_size)

    @property
    def preprocessing(self) -> ClipPreprocessing:
        return ClipPreprocessing(**vars(super().preprocessing), frames=self.config.num_frames)


_SIZES = {
    "tiny": VideoMambaClipsConfig(embed_dim=192),
    "small": VideoMambaClipsConfig(embed_dim=384),
    "middle": VideoMambaClipsConfig(embed_dim=576, depth=32),
}
VARIANTS = {
    f"videomamba_{size}_f{frames}": replace(config, num_frames=frames)
    for size, config in _SIZES.items()
    for frames in (8, 16, 32, 64)
}
SIDES = (224, 288, 384)  # that the authors' files are for


def matches(shapes: Shapes, hints: Hints) -> bool:
    """Whether these are the keys of a VideoMamba classifier of videos, which no other family has."""
    return all(key in shapes for key in ("temporal_pos_embedding", "layers.0.mixer.A_log", "head.weight")) and (
        len(shapes.get("patch_embed.proj.weight", ())) == 5
    )


def configure(shapes: Shapes, hints: Hints) -> VideoMambaClipsConfig:
    """The configuration that fits `shapes`; with `hints.variant` that one, for the classes and image size of the file.

    Raises CheckpointError.
    """
    model = "VideoMamba for videos"
    no_stride(hints, model)
    dim, _, tubelet, patch, _ = shape_of(shapes, "patch_embed.proj.weight", 5, model)
    tubelets = shape_of(shapes, "temporal_pos_embedding", 3, model)[1]
    frames = tubelet * tubelets
    stated = hints.settings.get("num_frames", (frames,))
    if stated != (frames,):
        raise CheckpointError(f"the file says num_frames {listing(stated)}, and its weights are for {frames}")
    flat: dict[str, Any] = {**shapes, "patch_embed.proj.weight": (dim, 3, patch, patch)}
    hints_here = replace(hints, stride=patch, variant=None)
    try:
        sizes = read_sizes(flat, hints_here, VARIANTS, model, extra_positions=1, sides=SIDES)
        found = VideoMambaClipsConfig(
            **{**sizes, **_as_authors(hints, sizes)},
            num_frames=frames,
            tubelet=tubelet,
            bimamba=mixer_has(shapes, "D_b"),
        )
        if hints.variant is None:
            return found
        images = {name: getattr(found, name) for name in ImageConfig.__dataclass_fields__}
        return replace(VARIANTS[hints.variant], image_size=found.image_size, num_classes=found.num_classes, **images)
    except UsageError as error:
        raise CheckpointError(f"not a {model}: {error.what}") from error


def _as_authors(hints: Hints, sizes: dict[str, Any]) -> dict[str, Any]:
    """Crop and interpolation: as stated, else as the authors evaluate their files of every image size."""
    published = sizes["image_size"][0] in SIDES
    crop = hints.eval_crop_ratio if hints.eval_crop_ratio is not None else (1.0 if published else None)
    return {"eval_crop_ratio": crop, "interpolation": hints.interpolation or "bilinear"}


def resize(
    state: dict[str, Tensor], config: VideoMambaClipsConfig, image_size: int
) -> tuple[dict[str, Tensor], VideoMambaClipsConfig]:
    """For frames of another size: bicubic for the patches' positions. The number of frames stays."""
    moved, resized = resize_positions(state["pos_embed"], config, image_size, old_class=(0,), new_class=(0,))
    return {**state, "pos_embed": moved}, resized


def _remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every key of a VideoMamba file is a weight, under the name that we use too."""
    return state


VIDEOMAMBA_CLIPS: Family = Family(
    name="videomamba-clips",
    title="VideoMamba for videos",
    matches=matches,
    configure=configure,
    build=VideoMambaClips,
    config_class=VideoMambaClipsConfig,
    remap=_remap,
    variants=VARIANTS,
    resize=resize,
    fills=fills,
    computes=COMPUTES,
)
