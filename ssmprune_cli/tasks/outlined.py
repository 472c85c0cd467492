"""Objects as pictures: masks and boxes over the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ssmprune_cli.models import Detections
from ssmprune_cli.tasks.painted import Classes, Pixels, colours

_STRENGTH = 0.5  # of the colour of a class


def covered(found: Detections) -> Classes:
    """(H, W): of which class the best object is that covers a pixel, counted from 1; 0 for none."""
    classes = np.zeros(found.masks.shape[1:], dtype=np.uint8)
    for mask, label in zip(reversed(found.masks.cpu().numpy()), reversed(found.labels.tolist()), strict=True):
        classes[mask] = label % 255 + 1
    return classes


def outlined(image: Pixels, found: Detections, names: Sequence[str]) -> Image.Image:
    """`image` with the objects in the colours of their classes, each in its box with name and score."""
    classes = covered(found)
    palette = colours(256)[0]
    blended = np.rint((1 - _STRENGTH) * image + _STRENGTH * palette[classes]).astype(np.uint8)
    picture = Image.fromarray(np.where((classes > 0)[..., None], blended, image))
    pen = ImageDraw.Draw(picture)
    for box, label, score in zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True):
        colour = tuple(palette[label % 255 + 1].tolist())
        pen.rectangle(box, outline=colour, width=2)
        name = names[label] if label < len(names) else f"class {label}"
        # The font that Pillow has for itself knows no other letters.
        words = f"{name.encode('ascii', 'replace').decode()} {100 * score:.0f}"
        pen.text((box[0] + 3, box[1] + 2), words, fill="white", stroke_width=1, stroke_fill="black")
    return picture
