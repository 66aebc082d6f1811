"""The cells of the sweep: which there are, and in which order they are measured.

The order is that of importance, so that a run that is stopped after any number of seconds has the
cells that the targets need, then those of the figures, then the rest of the grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ham.errors import ConfigError, unknown_choice

MIXER_DECODE = "mixer_decode"
MODEL_DECODE = "model_decode"
MODEL_PREFILL = "model_prefill"
MODEL_TRAIN = "model_train"
DECODE_PART = "model_decode_part"
EXPERIMENTS = (MIXER_DECODE, MODEL_DECODE, MODEL_TRAIN, DECODE_PART, MODEL_PREFILL)

HAM = "ham"
TRANSFORMER = "transformer"
RULE = "gated_delta_rule"
WINDOW = "sliding_window"
RULE_WINDOW = "gated_delta_rule_window"
EVICTED = "transformer_evicted"
FIRST_MODELS = (HAM, TRANSFORMER, RULE, "mamba2", WINDOW)
LATER_MODELS = (RULE_WINDOW, EVICTED)
"""Measured last: no target is about them.

`transformer_evicted` decodes only. It has the weights of a trained transformer, so there is no
training step of its own; and its prefill evicts every few tokens in a loop on the host, whose time
would be that of the loop.
"""
MODELS = (*FIRST_MODELS, *LATER_MODELS)

UNSTRUCTURED = "forced"
CLUSTERED = "forced, clustered"


@dataclass(frozen=True)
class Scale:
    """Sizes of the models and the grid.

    Attributes:
        contexts, batches, fractions: Tokens held before a step, sequences, routed shares.
        head_dims: Head sizes of the mixer cells; the first is that of the whole models.
        heads, layers: Of every model; the width is heads times head size.
        vocabulary: Rows of the embedding.
        window: Of the sliding window.
        train_contexts: Sequence lengths of the training step.
        train_tokens: Tokens of a training step; the batch is this over the context.
        prefill_tokens: Prefill cells with more tokens than this are not part of the grid.
        headline: Context and batch of the cell that the targets are about.
        long, short: Context and batch of the other two whole-model targets.
    """

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    fractions: tuple[float, ...]
    head_dims: tuple[int, ...]
    heads: int
    layers: int
    vocabulary: int
    window: int
    train_contexts: tuple[int, ...]
    train_tokens: int
    prefill_tokens: int
    headline: tuple[int, int]
    long: tuple[int, int]
    short: tuple[int, int]
    main_fraction: float = 0.25

    @property
    def width(self) -> int:
        """Width of the whole models."""
        return self.heads * self.head_dims[0]

    @property
    def longest(self) -> int:
        """Positions that every model must be able to read."""
        return max(*self.contexts, *self.train_contexts) + 2


FULL = Scale(
    contexts=(1024, 4096, 16384, 32768, 65536, 131072),
    batches=(1, 16, 64),
    fractions=(0.125, 0.25, 0.5, 1.0),
    head_dims=(64, 128),
    heads=16,
    layers=12,
    vocabulary=32000,
    window=1024,
    train_contexts=(1024, 2048, 4096, 8192, 16384, 32768),
    train_tokens=32768,
    prefill_tokens=262144,
    headline=(32768, 16),
    long=(131072, 8),
    short=(1024, 1),
)
SMOKE = Scale(
    contexts=(64, 128),
    batches=(1, 2),
    fractions=(0.25, 1.0),
    head_dims=(32, 16),
    heads=4,
    layers=2,
    vocabulary=257,
    window=64,
    train_contexts=(64, 128),
    train_tokens=128,
    prefill_tokens=256,
    headline=(128, 2),
    long=(128, 1),
    short=(64, 1),
)


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        experiment: One of `EXPERIMENTS`.
        model: A registered mixer.
        context: Tokens held before a decode step; sequence length of prefill and training.
        batch: Sequences.
        fraction: Share of tokens to route; None for a model that routes none.
        head_dim: Head size.
        routing: `forced`, or `forced, clustered` where neighbouring tokens are kept together.
    """

    experiment: str
    model: str
    context: int
    batch: int
    fraction: float | None
    head_dim: int
    routing: str = UNSTRUCTURED

    @property
    def name(self) -> str:
        """The cell in a few words, for progress and errors."""
        share = "" if self.fraction is None else f" f{self.fraction:g}"
        kind = " clustered" if self.routing == CLUSTERED else ""
        size = f"T{self.context} B{self.batch} D{self.head_dim}"
        return f"{self.experiment} {self.model} {size}{share}{kind}"


@dataclass(frozen=True)
class Choice:
    """Which cells a run is asked for; None means all."""

    experiments: Sequence[str] | None = None
    models: Sequence[str] | None = None
    contexts: Sequence[int] | None = None
    batches: Sequence[int] | None = None
    fractions: Sequence[float] | None = None
    quick: bool = False

    def check(self) -> None:
        """Refuse what no cell could have.

        Raises:
            ConfigError: Names the value received and the legal set.
        """
        for kind, values, legal in (
            ("experiment", self.experiments, EXPERIMENTS),
            ("model", self.models, MODELS),
        ):
            for value in values or ():
                if value not in legal:
                    raise unknown_choice(kind, value, legal)
        for kind, numbers in (("context", self.contexts), ("batch", self.batches)):
            for number in numbers or ():
                if number < 1:
                    raise ConfigError(f"{kind} must be at least 1, not {number}")
        for fraction in self.fractions or ():
            if not 0 < fraction <= 1:
                raise ConfigError(f"a fraction must be above 0 and at most 1, not {fraction:g}")

    def takes(self, cell: Cell) -> bool:
        """Whether the cell is asked for; training batches follow from the context."""
        sized = cell.experiment == MODEL_TRAIN or _among(cell.batch, self.batches)
        routed = cell.fraction is None or _among(cell.fraction, self.fractions)
        return (
            _among(cell.experiment, self.experiments)
            and _among(cell.model, self.models)
            and _among(cell.context, self.contexts)
            and sized
            and routed
        )


def choose_cells(scale: Scale, choice: Choice) -> tuple[Scale, list[Cell]]:
    """The cells asked for, the most important first, and the scale that they belong to.

    Contexts, batches and fractions that the scale does not list are added to its grid.

    Raises:
        ConfigError: If the choice names what does not exist, or leaves no cell.
    """
    choice.check()
    scale = replace(
        scale,
        contexts=_with(scale.contexts, choice.contexts),
        batches=_with(scale.batches, choice.batches),
        fractions=_with(scale.fractions, choice.fractions),
    )
    tiers = [*_headline_tiers(scale), *([] if choice.quick else _further_tiers(scale))]
    cells = dict.fromkeys(cell for tier in tiers for cell in tier if choice.takes(cell))
    if not cells:
        raise ConfigError("no cell of the sweep fits the experiments, models and sizes asked for")
    return scale, list(cells)


def _headline_tiers(scale: Scale) -> list[list[Cell]]:
    """What the targets rest on."""
    pair = (HAM, TRANSFORMER)
    main = (scale.main_fraction,)
    mixers = [
        cell
        for head_dim in scale.head_dims
        for cell in _cells(scale, MIXER_DECODE, [scale.headline], pair, main, head_dim)
    ]
    models = [
        *_cells(scale, MODEL_DECODE, [scale.headline, scale.long], pair, main),
        *_cells(scale, MODEL_DECODE, [scale.short], (HAM, RULE, TRANSFORMER), main),
    ]
    lengths = sorted(scale.train_contexts, reverse=True)
    training = _cells(scale, MODEL_TRAIN, _train_sizes(scale, lengths), pair, main)
    parts = _cells(scale, DECODE_PART, [scale.headline], pair, main)
    return [mixers, models, training, parts]


def _further_tiers(scale: Scale) -> list[list[Cell]]:
    """Figures first, then the rest of the grid from cheap to expensive."""
    middle = scale.headline[1]
    row = [(context, middle) for context in scale.contexts]
    single = [(context, 1) for context in scale.contexts if context <= scale.prefill_tokens]
    grid = sorted(
        ((context, batch) for context in scale.contexts for batch in scale.batches),
        key=lambda size: size[0] * size[1],
    )
    short_enough = [size for size in grid if size[0] * size[1] <= scale.prefill_tokens]
    main = (scale.main_fraction,)
    lengths = _train_sizes(scale, scale.train_contexts)
    clustered = [
        replace(cell, routing=CLUSTERED)
        for cell in (
            *_cells(scale, MIXER_DECODE, [scale.headline], (HAM,), main),
            *_cells(scale, MODEL_DECODE, [scale.headline], (HAM,), main),
            *_cells(scale, MODEL_PREFILL, single[-1:], (HAM,), main),
            *_cells(scale, MODEL_TRAIN, lengths[-1:], (HAM,), main),
        )
    ]
    return [
        _cells(scale, MODEL_DECODE, row, (HAM, TRANSFORMER)),
        _cells(scale, MODEL_DECODE, row, FIRST_MODELS[2:]),
        _cells(scale, MIXER_DECODE, row, (HAM, TRANSFORMER)),
        clustered,
        _cells(scale, MODEL_PREFILL, single, (HAM, TRANSFORMER), main),
        _cells(scale, DECODE_PART, [scale.headline, scale.short], fractions=main),
        _cells(scale, MODEL_DECODE, grid),
        _cells(scale, MODEL_TRAIN, lengths),
        *(_cells(scale, MIXER_DECODE, grid, head_dim=size) for size in scale.head_dims),
        _cells(scale, MODEL_PREFILL, short_enough),
        *_later_tiers(scale, row, single, lengths),
    ]


def _later_tiers(
    scale: Scale,
    row: Sequence[tuple[int, int]],
    single: Sequence[tuple[int, int]],
    lengths: Sequence[tuple[int, int]],
) -> list[list[Cell]]:
    """What the figures show of the models that come last."""
    return [
        _cells(scale, MODEL_DECODE, [scale.headline, *row, scale.long, scale.short], LATER_MODELS),
        _cells(scale, DECODE_PART, [scale.headline], LATER_MODELS),
        _cells(scale, MIXER_DECODE, row, LATER_MODELS),
        _cells(scale, MODEL_PREFILL, single, (RULE_WINDOW,)),
        _cells(scale, MODEL_TRAIN, lengths, (RULE_WINDOW,)),
    ]


def _cells(
    scale: Scale,
    experiment: str,
    sizes: Iterable[tuple[int, int]],
    models: Iterable[str] = FIRST_MODELS,
    fractions: Sequence[float] | None = None,
    head_dim: int | None = None,
) -> list[Cell]:
    """One cell for each size and model, and for each fraction of a model that routes."""
    models = tuple(models)
    shares = scale.fractions if fractions is None else fractions
    size = head_dim or scale.head_dims[0]
    return [
        Cell(experiment, model, context, batch, fraction, size)
        for context, batch in sizes
        for model in models
        for fraction in (shares if model == HAM else (None,))
    ]


def _train_sizes(scale: Scale, contexts: Iterable[int]) -> list[tuple[int, int]]:
    return [(context, max(1, scale.train_tokens // context)) for context in contexts]


def _with(listed: tuple, asked: Sequence | None) -> tuple:
    return tuple(sorted({*listed, *(asked or ())}))


def _among(value: object, wanted: Sequence | None) -> bool:
    return wanted is None or value in wanted
