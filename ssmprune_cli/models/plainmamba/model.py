"""PlainMamba: arXiv 2403.17695, ChenhongyiYang/PlainMamba at 0975a1d, with the authors' parameter names.

Glossary: B batch, L tokens now, G = rows * columns places of the grid, d model width. There is no class token; a
token's position is its raster index.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.interface import Mixers, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models.common import Backbone, Block, ImageConfig, Places, check_size, resize_grid
from ssmprune_cli.models.plainmamba.mixer import PlainMambaMixer
from ssmprune_cli.tokens import TokenSequence

BLOCK_NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6
STEM_CHANNELS = 64


@dataclass(frozen=True)
class PlainMambaConfig(ImageConfig):
    """Everything that defines a PlainMamba. An int for `image_size` is a square. UsageError for what does not fit.

    patch_size       even: a stem halves the image, then patches of half this size meet; sides are padded to fill them
    stem_convs       3 x 3 convolutions between the stem and the patches
    dw_layers        blocks that end in a depthwise 3 x 3 convolution
    out_indices      blocks whose outputs `feature_maps` returns, in rising order; all but the last (-1) have a norm of
                     their own
    num_classes      0 for the encoder of a dense model, which has no classifier
    positions        rows and columns of the position embeddings that are stored; None is the grid of `image_size`
    d_inner          channels of the scans; None is twice `embed_dim`
    dt_rank          rank of the step projection; None is `embed_dim / 16`, rounded up
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    embed_dim: int = 192
    depth: int = 24
    stem_convs: int = 1
    dw_layers: tuple[int, ...] = ()
    out_indices: tuple[int, ...] = (-1,)
    num_classes: int = 1000
    d_state: int = 16
    d_conv: int = 7
    d_inner: int | None = None
    dt_rank: int | None = None
    positions: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.image_size  # an int, or a list from JSON
        size = (given, given) if isinstance(given, int) else tuple(given)
        object.__setattr__(self, "image_size", size)
        for name in ("patch_size", "embed_dim", "depth", "d_state", "d_conv"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_classes < 0:
            raise UsageError(f"num_classes must not be negative, but is {self.num_classes}")
        if self.positions is not None:
            stored = tuple(self.positions)  # a list from JSON
            object.__setattr__(self, "positions", stored)
            if len(stored) != 2 or min(stored) < 1:
                raise UsageError(f"positions must be rows and columns, not {stored}")
        if len(size) != 2 or min(size) < 1:
            raise UsageError(f"an image cannot have the size {size}")
        if self.patch_size % 2 or not self.d_conv % 2:
            raise UsageError("patch_size must be even and d_conv odd")
        for name in ("dw_layers", "out_indices"):
            blocks = {index + self.depth if index < 0 else index for index in getattr(self, name)}
            if any(not 0 <= block < self.depth for block in blocks):
                raise UsageError(f"{name} {list(getattr(self, name))} must be blocks of {self.depth}")
            object.__setattr__(self, name, tuple(sorted(blocks)))
        # In one form, which another depth does not change: the last block is -1.
        outputs = tuple(-1 if block == self.depth - 1 else block for block in self.out_indices)
        object.__setattr__(self, "out_indices", outputs)

    def without_blocks(self, count: int) -> PlainMambaConfig | None:
        if self.out_indices != (-1,):
            return None
        depth = self.depth - count
        return replace(self, depth=depth, dw_layers=tuple(index for index in self.dw_layers if index < depth))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.grid_of(self.image_size)

    @property
    def map_channels(self) -> tuple[int, ...]:
        """Of the feature maps."""
        return (self.embed_dim,) * len(self.out_indices)

    def grid_of(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image of this height and width."""
        rows, columns = (math.ceil(math.ceil(side / 2) / (self.patch_size // 2)) for side in image_size)
        return rows, columns


class ConvPatchEmbed(nn.Module):
    """Images (B, 3, H, W) to embedded patches (B, d, rows, columns)."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        half, width = config.patch_size // 2, STEM_CHANNELS
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        layers: list[nn.Module] = []
        for _ in range(config.stem_convs):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.convs = nn.Sequential(*layers)
        self.projection = nn.Conv2d(width, config.embed_dim, half, stride=half)

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.convs(self.stem(images))  # (B, 64, H / 2, W / 2), rounded up
        half = self.projection.stride[0]
        bottom, right = (-side % half for side in pixels.shape[2:])
        embedded: Tensor = self.projection(functional.pad(pixels, (0, right, 0, bottom)))
        return embedded


class PlainMambaLayer(Block):
    """x + mixer(norm(x)); with `dw`, a depthwise convolution then takes the place of the result: no skip around it."""

    def __init__(self, config: PlainMambaConfig, *, dw: bool) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        self.dw = None
        if dw:
            conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
            self.dw = nn.Sequential(conv, nn.BatchNorm2d(dim), nn.GELU())
        self.mamba = PlainMambaMixer(
            dim,
            d_inner=config.d_inner or 2 * dim,
            d_state=config.d_state,
            d_conv=config.d_conv,
            dt_rank=config.dt_rank or math.ceil(dim / 16),
        )

    def run(
        self, sequence: TokenSequence, alignment: ScanAlignment | None, wanted: Wanted
    ) -> tuple[TokenSequence, ScanStatistics]:
        x = sequence.hidden
        frozen, context = (
            None if dropped is None else self.norm(dropped.stream.to(x.dtype))
            for dropped in (sequence.frozen, sequence.context)
        )
        mixed, statistics = self.mamba(self.norm(x), sequence, alignment, wanted, frozen, context)
        x = x + self.drop(mixed)
        if self.dw is not None:
            x = self._convolve(x, sequence, self.dw)
        return replace(sequence, hidden=x), statistics

    def _convolve(self, x: Tensor, sequence: TokenSequence, dw: nn.Sequential) -> Tensor:
        """`dw` at the places of the tokens x (B, L, d). Missing tokens are zero, and in no statistics of the norm."""
        convolution, norm, activation = dw
        x = x.transpose(1, 2)  # (B, d, L)
        if sequence.is_dense:
            x = convolution(x.unflatten(2, sequence.patch_grid)).flatten(2)
        else:
            index = sequence.positions[:, None].expand(-1, x.shape[1], -1)  # (B, d, L)
            image = x.new_zeros(*x.shape[:2], sequence.length).scatter(2, index, x)
            x = convolution(image.unflatten(2, sequence.patch_grid)).flatten(2).gather(2, index)
        result: Tensor = activation(norm(x[..., None]))[..., 0].transpose(1, 2)
        return result  # (B, L, d)


class Trunk(nn.Module):
    """The weights that the authors' checkpoints hold under `backbone.`."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.positions = config.positions or config.grid
        self.patch_embed = ConvPatchEmbed(config)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, math.prod(self.positions), dim), std=0.02))
        self.layers = nn.ModuleList(PlainMambaLayer(config, dw=i in config.dw_layers) for i in range(config.depth))
        if config.num_classes or -1 in config.out_indices:
            self.ln1 = nn.LayerNorm(dim, eps=FINAL_NORM_EPS)
        for index in config.out_indices:
            if index != -1:
                self.add_module(f"norm_layer{index}", nn.LayerNorm(dim, eps=FINAL_NORM_EPS))

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embedded patches (B, G, d) of images (B, 3, H, W), and the rows and columns of their grid."""
        embedded: Tensor = self.patch_embed(images)  # (B, d, rows, columns)
        grid = (int(embedded.shape[2]), int(embedded.shape[3]))  # when traced, they are tensors
        positions = self.pos_embed if grid == self.positions else resize_grid(self.pos_embed, self.positions, grid)
        return embedded.flatten(2).transpose(1, 2) + positions, grid


class PlainMamba(Backbone):
    """See PlainMambaConfig. `features` are the tokens after the last block, before the final norm."""

    family = "plainmamba"

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.config: PlainMambaConfig = config
        self.backbone = self.make_trunk(config)
        if config.num_classes:
            self.head = nn.ModuleDict({"fc": nn.Linear(config.embed_dim, config.num_classes)})
        for name, module in self.named_modules():
            # As the authors' training configuration, which also overrides what their code does with dt_proj.
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.01 if name == "head.fc" else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @staticmethod
    def make_trunk(config: Any) -> Trunk:
        """What the authors' checkpoints hold under `backbone.`."""
        return Trunk(config)

    def features(self, images: Tensor) -> TokenSequence:
        """The tokens that are left after all blocks. DataError for images of another size than the model's."""
        check_size(images, self.image_size)
        return deque(self._blocks(images), maxlen=1).pop()[1]

    def feature_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normed outputs of the blocks `out_indices`, (B, d, rows, columns) each, at every place of the grid.

        A dropped token is in them as it left, unless the pruner says otherwise (see `TokenSequence.returning`), and the
        blocks after go on without it.
        """
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise DataError(f"the model takes images (B, 3, H, W), not {tuple(images.shape)}")
        maps, grid = [], self.config.grid_of((int(images.shape[2]), int(images.shape[3])))
        for block, (sequence, _) in enumerate(self._blocks(images, restorable=True)):
            index = -1 if block == self.config.depth - 1 else block
            if index in self.config.out_indices:
                norm = self.backbone.get_submodule("ln1" if index == -1 else f"norm_layer{index}")
                whole = sequence.restored()
                values = whole.spread(norm(whole.hidden))  # merged tokens at every place that they took in
                maps.append(values.transpose(1, 2).unflatten(2, grid))
        return tuple(maps)

    def _blocks(self, images: Tensor, *, restorable: bool = False) -> Iterator[tuple[TokenSequence, TokenSequence]]:
        """The tokens after each block, before and after pruning; `restorable` ones can be brought back."""
        embedded, grid = self.backbone(images)
        sequence = TokenSequence.dense(embedded, grid=grid, restorable=restorable)
        for block in range(self.config.depth):
            before, sequence = self.step(block, sequence)
            yield before, sequence

    def step(self, block: int, sequence: TokenSequence) -> tuple[TokenSequence, TokenSequence]:
        """The tokens after `block`, of those in front of it: before and after pruning."""
        alignment, wanted = self.ask_pruner(block, sequence)
        before, statistics = self.backbone.layers[block](sequence, alignment, wanted)
        return before, self.prune(block, before, statistics, wanted)

    def pool(self, sequence: TokenSequence) -> Tensor:
        """(B, d): what the head sees, the mean of the normalised tokens."""
        return sequence.mean(self.backbone.ln1(sequence.hidden))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, 3, H, W)."""
        sequence = self.features(images)
        return self.classify(self.pool(sequence), sequence.readout)

    @property
    def output_layer(self) -> nn.Linear:
        if not self.config.num_classes:
            return super().output_layer
        return self.head["fc"]  # type: ignore[return-value]

    @property
    def blocks(self) -> list[Block]:
        return list(self.backbone.layers)  # type: ignore[arg-type]

    @property
    def places(self) -> Places:
        names = {index: f"backbone.norm_layer{index}" for index in self.config.out_indices if index != -1}
        maps = {name: index + 1 for index, name in names.items()}
        return Places(
            before=("backbone.patch_embed", "backbone.pos_embed"),
            after=("backbone.ln1", "head"),
            undecayed=("pos_embed", "A_log"),
            decayed=("direction_Bs",),
            between={} if self.config.num_classes else maps,
            idle=tuple(maps) if self.config.num_classes else (),
        )

    @property
    def mixers(self) -> Mixers:
        return [layer.mamba for layer in self.backbone.layers]  # type: ignore[misc]

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.grid
