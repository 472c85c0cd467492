"""A Mamba language model: tokens of a window in one sequence of blocks, of which prefill may drop some.

Dao and Gu, arXiv 2312.00752 and 2405.21060; state-spaces/mamba e9594ce (models/mixer_seq_simple.py). Letters: B batch,
L tokens, K last tokens that are protected, d model width, V vocabulary.

Blocks are causal, so what a window's last tokens say is what a pruned prefill of the tokens before them says, followed
by those tokens one after another.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.interface import Mixer
from ssmprune_cli.models.language.config import LanguageConfig
from ssmprune_cli.models.language.recurrence import Recurrence
from ssmprune_cli.models.mamba import MambaSequence
from ssmprune_cli.preprocessing import TextWindow
from ssmprune_cli.tokens import Readout, TokenSequence


class LanguageModel(MambaSequence):
    """A family makes its mixers, and calls `add_mixers`. See LanguageConfig.

    A call takes token numbers (B, L), int64, and gives logits (B, V, K) of what follows each of the last K tokens:
    those that are always there, whatever is dropped. `logits` gives those of all tokens.
    """

    task = "language"
    inputs = "text"
    any_size = True
    tokens = ("embedding",)
    rates = ("A_log",)
    config: LanguageConfig

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.after_blocks = ("norm_f",) if config.tied else ("norm_f", "lm_head")
        if not config.tied:
            self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)

    @abstractmethod
    def recurrence(self, mixer: Mixer) -> Recurrence:
        """How `mixer` goes on token by token."""

    def embed(self, images: Tensor) -> TokenSequence:
        """Token numbers (B, L) to the dense sequence."""
        if images.ndim != 2 or images.dtype != torch.int64 or 0 in images.shape:
            raise DataError(
                f"the model takes token numbers (B, L) in int64, not {images.dtype} {tuple(images.shape)}",
                hint="Give the numbers that its tokenizer makes of a text.",
            )
        return TokenSequence.dense(self.embedding(images), self._last(images.shape[1]))

    def pool(self, sequence: TokenSequence) -> Tensor:
        """(B, K, d): the last tokens, normalised; all of a window that has no more."""
        return self.normalised(sequence.protected_stream())

    def normalised(self, stream: Tensor) -> Tensor:
        """The final norm of (B, n, d), in the precision of the weights."""
        normalised: Tensor = self.norm_f(stream)
        return normalised

    def classify(self, pooled: Tensor, readout: Readout | None) -> Tensor:
        return self.scores(pooled).transpose(1, 2)

    def scores(self, normalised: Tensor) -> Tensor:
        """Logits (B, n, V) of tokens (B, n, d)."""
        weight = self.embedding.weight if self.config.tied else self.lm_head.weight
        return functional.linear(normalised, weight)

    def logits(self, ids: Tensor) -> Tensor:
        """(B, L, V) of all tokens of `ids` (B, L). UsageError for a model that drops tokens: it has none of those."""
        if self.pruner is not None:
            raise UsageError(
                "a model that drops tokens has logits of the last ones only",
                hint="Call the model itself for these, or `restore(model)` first.",
            )
        self.check_ids(ids)
        return self.scores(self.normalised(self.features(ids).stream))

    def check_ids(self, ids: Tensor) -> None:
        """DataError unless all of `ids` are numbers of tokens."""
        outside = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(outside):
            raise DataError(
                f"there is a token {int(outside[0])}, and the vocabulary has {self.config.vocab_size:,} "
                f"(0 to {self.config.vocab_size - 1:,})",
                hint="Is this the model's own tokenizer?",
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.config.length,)

    def example(self, batch_size: int, seed: int | None = None) -> Tensor:
        return self.window(batch_size, self.config.length, seed)

    def window(self, batch_size: int, length: int, seed: int | None = None) -> Tensor:
        """`example` of another length."""
        device, size = self.embedding.weight.device, (batch_size, length)
        if seed is None:
            return torch.zeros(size, dtype=torch.int64, device=device)
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(self.config.vocab_size, size, generator=draw).to(device)

    def _last(self, length: int) -> tuple[int, ...]:
        return tuple(range(max(0, length - self.config.protect_last), length))

    @property
    def output_layer(self) -> nn.Linear:
        raise UsageError("the head of a language model has no bias, and a repair is for one that has")

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens of a window that may be dropped, as one row."""
        return 1, self.config.length - self.config.protect_last

    @property
    def protected(self) -> tuple[int, ...]:
        return self._last(self.config.length)

    @property
    def preprocessing(self) -> TextWindow:
        return TextWindow(self.config.length, self.config.vocab_size, self.config.protect_last)
