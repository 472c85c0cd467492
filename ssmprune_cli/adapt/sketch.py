"""The lines to start from, for a file of weights that no family of ours knows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ssmprune_cli.adapt.mixers import Seen

_TEXT = """\
import ssmprune_cli as ssmprune

model = ...  # your own module, with these weights loaded
print(ssmprune.accelerate(model))  # which mixers are proven, and faster now
# Tokens are dropped inside the mixers:
ssmprune.compress(model, keep=0.7, points=[{point}], calibration=inputs)


# If a mixer is refused, or blocks are to run on the tokens that are left:
class MyAdapter(ssmprune.Adapter):
    def embed(self, inputs):
        ...  # what enters the first block, (B, L, {width})

    def head(self, tokens, positions):
        ...  # the answer, from the tokens that are left


adapted = MyAdapter(model, model{blocks})
ssmprune.compress(adapted, keep=0.7, points=[{point}], calibration=inputs)
"""


def sketch(mixers: Sequence[Seen]) -> str:
    """Python for a model with these mixers, of which there is at least one."""
    numbered = re.match(r"(?:(.*?)\.)?\d+(?:\.|$)", mixers[0].name)
    blocks = f".{numbered[1]}" if numbered is not None and numbered[1] else ""
    return _TEXT.format(blocks=blocks, width=mixers[0].width or "d", point=max(1, len(mixers) // 2))
