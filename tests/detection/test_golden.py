"""Mask R-CNN against what the authors' code computes; see tests/golden/README.md."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssmprune_cli.models.heads import MaskRCNN
from ssmprune_cli.models.heads.mask_rcnn.masks import paste
from ssmprune_cli.models.heads.mask_rcnn.roi_head import BOX_CELLS, MASK_CELLS, regions
from ssmprune_cli.models.heads.mask_rcnn.rpn import propose
from ssmprune_cli.models.plainmamba.adapter import PlainMambaAdapter
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from tests.detection.conftest import Golden

# Measured: 8e-5 (features of values up to 29), below 3e-6 elsewhere. `aligned` off moves regions by 2, two samples for
# each cell by 0.5, a level further by 8.
FEATURES, TOLERANCE = 2e-4, 1e-5
# Pixels. Measured: 7e-5 of coordinates up to 320, whose float32 has steps of 3e-5.
BOXES = 1e-3


def head_of(golden: Golden) -> MaskRCNN:
    head = MaskRCNN(golden.head).eval()
    head.load_state_dict({name: value for name, value in golden.state.items() if not name.startswith("backbone.")})
    return head


def encoder_of(golden: Golden) -> VMamba | PlainMambaAdapter:
    state = {name: value for name, value in golden.state.items() if name.startswith("backbone.")}
    if isinstance(golden.encoder, VMambaConfig):
        encoder: VMamba | PlainMambaAdapter = VMamba(golden.encoder)
        state = {name.removeprefix("backbone."): value for name, value in state.items()}
    else:
        encoder = PlainMambaAdapter(golden.encoder)
    encoder.load_state_dict(state)
    return encoder.eval()


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def masks_of(golden: Golden) -> Tensor:
    """The authors' masks of the best objects, (N, H, W)."""
    height, width = golden.frame.original
    bits = np.unpackbits(golden.values["final.masks_packed"].numpy(), axis=1)[:, : height * width]
    return torch.from_numpy(bits).view(-1, height, width).bool()


@torch.no_grad()
def test_encoder(golden: Golden) -> None:
    for found, expected in zip(encoder_of(golden).feature_maps(golden.images), golden.features, strict=True):
        assert_near(found, expected, FEATURES)


@torch.no_grad()
def test_pyramid_and_proposals(golden: Golden) -> None:
    head = head_of(golden)
    levels = head(golden.features)
    assert [tuple(level.shape[2:]) for level in levels[:4]] == [tuple(each.shape[2:]) for each in golden.features]
    outputs = head.rpn_head(levels)
    for number in range(1, 5):
        assert_near(levels[number], golden.values[f"fpn.{number}"], TOLERANCE)
        for kind, found in zip(("cls", "reg"), outputs[number], strict=True):
            assert_near(found, golden.values[f"rpn.{kind}.{number}"], TOLERANCE)
    boxes, scores = propose([(logits[0], deltas[0]) for logits, deltas in outputs], golden.frame.scaled)
    assert bool((scores[1:] <= scores[:-1]).all())
    # As a set: scores are up to 2e-7 near to each other, so that neighbours may change places.
    apart = torch.cdist(boxes, golden.values["proposals"], p=torch.inf)
    assert apart.shape == (1000, 1000)
    assert float(apart.min(dim=0).values.max()) < BOXES and float(apart.min(dim=1).values.max()) < BOXES


@torch.no_grad()
def test_regions_and_what_is_in_them(golden: Golden) -> None:
    head, values = head_of(golden), golden.values
    levels = [level[0] for level in head(golden.features)]
    inside = regions(levels, values["proposals"], BOX_CELLS)
    count = len(values["bbox.roi_feats"])
    assert_near(inside[:count], values["bbox.roi_feats"], TOLERANCE)
    logits, deltas = head.roi_head.bbox_head(inside)
    assert_near(logits[:count], values["bbox.cls_score"], TOLERANCE)
    assert_near(deltas.flatten(1)[:count], values["bbox.bbox_pred"], TOLERANCE)
    boxes, scores, labels = head.choose(values["proposals"], logits, deltas, golden.frame)
    height, width = (after / before for after, before in zip(golden.frame.scaled, golden.frame.original, strict=True))
    factors = torch.tensor([width, height, width, height])
    original = boxes if golden.head.original_first else boxes / factors
    assert_near(original, values["final.boxes"], BOXES)
    assert_near(scores, values["final.scores"], TOLERANCE)
    assert torch.equal(labels, values["final.labels"])
    shapes = head.roi_head.mask_head(regions(levels, values["final.boxes"] * factors, MASK_CELLS))
    shapes = shapes[torch.arange(len(labels)), labels]
    count = len(values["det.mask_logits_of_label"])
    assert_near(shapes[:count], values["det.mask_logits_of_label"], 10 * TOLERANCE)  # of boxes that were rounded
    masks = paste(shapes.sigmoid(), values["final.boxes"], golden.frame.original)
    assert torch.equal(masks[: len(masks_of(golden))], masks_of(golden))
    assert torch.equal(masks.flatten(1).sum(dim=1), values["final.mask_area"])


@torch.no_grad()
def test_from_the_image_to_the_masks(golden: Golden) -> None:
    """All in one, for a batch of two images that are the same."""
    head, encoder = head_of(golden), encoder_of(golden)
    levels = head(encoder.feature_maps(golden.images.expand(2, -1, -1, -1)))
    first, second = head.detect(levels, [golden.frame, golden.frame])
    assert_near(first.boxes, golden.values["final.boxes"], BOXES)
    assert_near(first.scores, golden.values["final.scores"], TOLERANCE)
    assert torch.equal(first.labels, golden.values["final.labels"])
    expected = masks_of(golden)
    wrong = (first.masks[: len(expected)] ^ expected).sum()
    assert int(wrong) <= 2  # of a million pixels: a probability may be one half
    assert torch.equal(first.labels, second.labels) and torch.equal(first.masks, second.masks)


@torch.no_grad()
def test_parts_of_the_adapter(plainmamba: Golden) -> None:
    adapter, values = encoder_of(plainmamba), plainmamba.values
    assert isinstance(adapter, PlainMambaAdapter)
    first = adapter.backbone.get_submodule("interactions.0")
    seen: dict[str, Tensor] = {}
    hooked = {
        "interactions.0.injector.attn.out": first.get_submodule("injector.attn"),
        "interactions.0.injector.x": first.get_submodule("injector"),
        "interactions.0.extractor.attn.out": first.get_submodule("extractor.attn"),
        "interactions.0.c": first.get_submodule("extractor"),
    }
    for name, module in hooked.items():
        module.register_forward_hook(lambda *called, name=name: seen.update({name: called[2]}))
    adapter.backbone.get_submodule("layers.1").register_forward_hook(
        lambda *called: seen.update({"interactions.0.x": called[2][0].hidden})
    )
    maps = adapter.backbone.spm(plainmamba.images)
    assert_near(maps[0][:, ::6], values["spm.c1"], TOLERANCE)
    for number in (1, 2, 3):
        assert_near(maps[number].flatten(2).transpose(1, 2), values[f"spm.c{number + 1}"], TOLERANCE)
    adapter.feature_maps(plainmamba.images)
    assert seen.keys() == {name for name in values if name.startswith("interactions.")}
    for name, found in seen.items():
        assert_near(found, values[name], 2 * TOLERANCE)
