"""What defines a Mamba language model, whichever mixer it has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models.common import tuples

LENGTH = 1024  # tokens of a window, unless its user says otherwise
PROTECT_LAST = 4
MAX_LENGTH = 1 << 20

C = TypeVar("C", bound="LanguageConfig")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Sizes of a language model. UsageError for what does not fit.

    vocab_size    rows of the embedding, padding included
    d_inner       channels of the scans; None is twice `embed_dim`
    tied          the head is the embedding
    length        tokens of a window: figures and token counts are for it, and shares of it hold for any other length
    protect_last  last tokens of a window, which are never dropped: the answers are their next tokens. At least as many
                  as a convolution sees, so that what it needs for the next token is there
    cut_from      as of an ImageConfig
    """

    vocab_size: int = 50280
    embed_dim: int = 768
    depth: int = 24
    d_state: int = 16
    d_conv: int = 4
    d_inner: int | None = None
    tied: bool = True
    length: int = LENGTH
    protect_last: int = PROTECT_LAST
    cut_from: tuple[tuple[str, Any], ...] | None = None
    norm: ClassVar[str] = "rms"
    resized_from: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.cut_from is not None:
            object.__setattr__(self, "cut_from", tuples(self.cut_from))  # lists from JSON
        for name in ("vocab_size", "embed_dim", "depth", "d_state", "d_conv", "length", "protect_last"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.protect_last < self.d_conv:
            raise UsageError(
                f"the convolution sees {self.d_conv} tokens, so no fewer are protected, and not {self.protect_last}",
                where="--protect-last",
            )
        if not self.protect_last < self.length <= MAX_LENGTH:
            raise UsageError(
                f"a window of {self.length:,} tokens, of which the last {self.protect_last:,} are protected, has none "
                f"to drop; windows of up to {MAX_LENGTH:,} are possible",
                where="--length",
            )

    def without_blocks(self: C, count: int) -> C:
        """The same without the last `count` blocks."""
        return replace(self, depth=self.depth - count)

    @property
    def inner_channels(self) -> int:
        """Channels of the scans."""
        return self.d_inner or 2 * self.embed_dim

    @property
    def image_size(self) -> tuple[int, int]:
        """A window as one row: where images have a height and a width."""
        return 1, self.length

    @property
    def num_classes(self) -> int:
        return self.vocab_size
