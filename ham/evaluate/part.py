"""What every part of an evaluation gets and gives.

A part is a list of cells. A cell says beforehand which rows it will make, so that a cell that
fails can be reported at its own coordinates, and it either returns all of its rows or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ham.config import ArmConfig, Config
from ham.errors import ConfigError
from ham.evaluate.scoring import BATCH_TOKENS, OnBatch, RoutingCount, RowScore, score_rows

if TYPE_CHECKING:
    import torch

    from ham.model.language_model import LanguageModel
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
        seed: The seed of the training run.
        samples: The answers to every lm-eval question are appended here.
        documents: Bits and bytes of every held-out document are appended here.
        on_batch: Called after each forward pass with the rows done and the rows in all.
        foreign: Whether the model was trained elsewhere, perhaps with a tokenizer of its own; the
            texts are then encoded again.
    """

    config: Config
    model: LanguageModel
    tokenizer: Tokenizer
    data: Path
    seed: int = 0
    samples: list[Fields] = field(default_factory=list)
    documents: list[Fields] = field(default_factory=list)
    on_batch: OnBatch | None = None
    foreign: bool = False

    @cached_property
    def test(self) -> TokenShard:
        """The shard of the test split."""
        return self.shard("test")

    def shard(self, split: str) -> TokenShard:
        """The token shard of a split.

        Raises:
            MissingDataError: If it was not prepared.
            CorruptFileError: If it is truncated or changed.
            ConfigError: If it was made with another tokenizer than the model's.
        """
        from ham.train.shards import TokenShard

        shard = TokenShard.open(self.data / f"{split}.tokens", verify=split != "train")
        if self.reencodes:
            from ham.train.retokenise import retokenise

            return retokenise(shard, self._data_tokenizer, self.tokenizer)
        made = (shard.tokenizer_name, shard.vocabulary_size)
        if made != (self.tokenizer.name, self.tokenizer.vocabulary_size):
            raise ConfigError(
                f"{self.data / split}.tokens was made with tokenizer {made[0]!r} ({made[1]} "
                f"tokens); the model has {self.tokenizer.name!r} "
                f"({self.tokenizer.vocabulary_size} tokens)"
            )
        return shard

    @cached_property
    def reencodes(self) -> bool:
        """Whether the model's tokenizer is another than that of the shards."""
        from ham.train.retokenise import same_tokens

        return self.foreign and not same_tokens(self.tokenizer, self._data_tokenizer)

    @cached_property
    def _data_tokenizer(self) -> Tokenizer:
        from ham.train.tokenizer import load_tokenizer

        return load_tokenizer(self.config.data.tokenizer, self.data)

    def score(
        self,
        rows: Sequence[Sequence[int]],
        routing: RoutingCount | None = None,
        keep_routed: bool = False,
    ) -> list[RowScore]:
        """`score_rows` with batches that suit the device: a CPU's cache or a GPU's memory."""
        batch_tokens = BATCH_TOKENS if self.model.device.type == "cpu" else 64 * BATCH_TOKENS
        return score_rows(self.model, rows, batch_tokens, routing, keep_routed, self.on_batch)

    def kv_fraction(self, routing: RoutingCount, context: int) -> float | None:
        """Realised share of tokens in the KV cache: 1 for full attention, None without a cache."""
        return routing.fraction() if self.model.routes else self.model.held_share(context)


def open_subject(
    config: Config, arm: ArmConfig, data: Path, checkpoint: Path, device: torch.device
) -> Subject:
    """Load a checkpoint and check that it is the one that the configuration describes.

    Raises:
        MissingDataError, CorruptFileError: If checkpoint or data are missing or damaged.
        ConfigError: If the checkpoint is of another arm or tokenizer.
        UnusableModelError: If the model cannot be used here.
    """
    from ham.model.arm import load_arm
    from ham.train.tokenizer import load_tokenizer

    model = load_arm(config, arm, checkpoint, device)
    tokenizer = load_tokenizer(model.config.tokenizer, checkpoint)
    return Subject(config, model, tokenizer, data, foreign=arm.checkpoint is not None)
