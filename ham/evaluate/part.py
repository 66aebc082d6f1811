"""What every part of an evaluation gets and gives.

A part is a list of cells. A cell says beforehand which rows it will make, so that a cell that
fails can be reported at its own coordinates, and it either returns all of its rows or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ham.config import Config
from ham.evaluate.scoring import BATCH_TOKENS, RoutingCount

if TYPE_CHECKING:
    from ham.model.decoder import DecoderLM
    from ham.train.shards import TokenShard
    from ham.train.tokenizer import Tokenizer

Fields = dict[str, Any]

EVALUATION_SEED = 20260322
"""Every model and every training seed is asked the same questions."""

CORPUS_TASK = "public_domain_test"


@dataclass(frozen=True)
class Cell:
    """One piece of work.

    Attributes:
        name: For the progress display.
        expected: `experiment`, `metric` and coordinates of the main rows; these become error
            rows when the cell fails.
        run: Makes the rows: keyword arguments of `RowWriter.add`.
    """

    name: str
    expected: Sequence[Fields]
    run: Callable[[], list[Fields]]


@dataclass
class Subject:
    """A trained model with the data it is asked about.

    Attributes:
        config: The experiment.
        model: In evaluation mode, on its device.
        tokenizer: The model's tokenizer.
        data: Folder written by `ham prepare`.
        samples: Where the answers to every lm-eval question are kept, or None.
    """

    config: Config
    model: DecoderLM
    tokenizer: Tokenizer
    data: Path
    samples: Path | None = None

    @cached_property
    def test(self) -> TokenShard:
        """The shard of the test split."""
        return self.shard("test")

    def shard(self, split: str) -> TokenShard:
        """The token shard of a split.

        Raises:
            MissingDataError: If it was not prepared.
            CorruptFileError: If it is truncated or changed.
        """
        from ham.train.shards import TokenShard

        return TokenShard.open(self.data / f"{split}.tokens")

    @property
    def batch_tokens(self) -> int:
        """Tokens per forward pass: bounded by the cache of a CPU, by the memory of a GPU."""
        return BATCH_TOKENS if self.model.device.type == "cpu" else 64 * BATCH_TOKENS

    def kv_fraction(self, routing: RoutingCount, context: int) -> float | None:
        """Realised share of tokens in the KV cache: 1 for full attention, None without a cache."""
        if self.model.routes:
            return routing.fraction()
        config = self.model.config
        full = 2 * context * config.width * config.layers
        return 1.0 if self.model.state_bytes(context, element_size=1).kv == full else None
