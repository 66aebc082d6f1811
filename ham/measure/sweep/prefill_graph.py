"""Whole prompts as one CUDA graph, and the launch behind it that fills the pages of routed tokens.

The graph holds the reading of the prompt: empty memories, all blocks, the logits after the last
token, the first token of each sequence. What it cannot hold is the allocation of as many pages as
were routed, which the host does once it has read the counts (`ham.paging.prompt`). A call does
both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ham.errors import DeviceError
from ham.kernels.sdpa import fastest_first
from ham.kernels.speed.clock import Task, capture
from ham.layer import HamState
from ham.measure.sweep.causes import whole_cause
from ham.model.decoder import Block, DecoderLM
from ham.model.decoder_state import DecoderState
from ham.model.mixer import MixerState, RoutingHints
from ham.paging.prompt import RoutedTokens, TokenIndex, index_tokens, store_tokens
from ham.stores.threshold import ThresholdCache

RECOMPILATIONS = {"recompile_limit": 512, "accumulated_recompile_limit": 4096}
"""Codes that torch keeps, one for each kind of block and size; beyond them it would not compile."""


@dataclass
class Reading:
    """What reading a prompt leaves; a replay writes the same tensors anew.

    Attributes:
        logits_BV: After the last token.
        tokens_B: Int64; the likeliest next token.
        state: The decoding memory, but for the routed tokens.
        prompts: Those, of each layer with a cache in pages.
        index: Which they are; None without such a layer.
    """

    logits_BV: Tensor
    tokens_B: Tensor
    state: DecoderState
    prompts: list[RoutedTokens]
    index: TokenIndex | None


class GraphPrefill:
    """Reads prompts of one shape into an empty memory.

    Every call reads what stands in `tokens_BT` then. Without `capture` the same operations are
    launched one by one, which is how they are tested where there is no GPU.

    Args:
        model: In evaluation mode.
        batch, length: Of the prompts.
        fuse: Have blocks compiled for this shape, as in training.

    Attributes:
        tokens_BT: Int64 token ids, to be written in place.
        reading: What the last call left. The next call writes over it and must find it as it is:
            decode from a copy, `DecoderState.join([prefill.reading.state])`.

    Raises:
        ConfigError: For a length that the model cannot read.
    """

    def __init__(self, model: DecoderLM, batch: int, length: int, fuse: bool = False):
        model.check_length(length)
        self.model = model
        self.tokens_BT = torch.zeros(batch, length, dtype=torch.int64, device=model.device)
        self.reading: Reading | None = None
        self._block = torch.compile(read_block, dynamic=False) if fuse else read_block
        self._replay: Callable[[], None] | None = None

    def capture(self) -> None:
        """Record the reading; kernels must have been compiled by an ordinary prefill of this shape.

        Raises:
            DeviceError: Where torch cannot record it, memory included.
        """
        try:
            # Compiles blocks, and builds plans, which may wait for the device.
            self._read()
            graph = capture(Task(self._read, torch.no_grad))
        except Exception as error:
            # Compilers raise what they like, and an ordinary prefill has worked.
            reason = f"a prefill cannot be a CUDA graph: {whole_cause(error)}"
            raise DeviceError(reason) from error
        self.reading, self._replay = graph.result, graph.replay

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The first token of each sequence, `tokens_B`; waits for the device if it routes."""
        if self._replay is None:
            # The memory of the call before goes first: two would not fit where one barely does.
            self.reading = None
            self.reading = self._read()
        else:
            self._replay()
            # Pages of the call before are given up while the device reads.
            _take_pages_out(self.reading)
        _put_pages_in(self.reading)
        return self.reading.tokens_B

    @torch.no_grad()
    def _read(self) -> Reading:
        """What the graph holds: nothing here waits for the device."""
        model, hints = self.model, RoutingHints(self.tokens_BT)
        state = model.init_state(self.tokens_BT.shape[0])
        prompts = [_set_apart(cache) for cache in map(routed_cache, state.layers) if cache]
        x_BTD = model.embedding(self.tokens_BT)
        with (
            fastest_first(model.device),
            torch._dynamo.config.patch(**RECOMPILATIONS),
        ):
            for block, layer_state in zip(model.blocks, state.layers, strict=True):
                x_BTD = self._block(block, x_BTD, layer_state, hints)
        state.positions.advance(self.tokens_BT.shape[1])
        last_BD = model.final_norm(x_BTD[:, -1])
        logits_BV = (last_BD @ model.embedding.weight.T)[:, : model.config.vocabulary_size]
        index = index_tokens(prompts) if prompts else None
        return Reading(logits_BV, logits_BV.argmax(dim=-1), state, prompts, index)


def read_block(block: Block, x_BTD: Tensor, state: MixerState, hints: RoutingHints) -> Tensor:
    """`Block.prefill` without its report."""
    y_BTD, _ = block.prefill(x_BTD, state, hints)
    history_BWC = getattr(state, "history_BWC", None)
    if history_BWC is not None:
        # A view of the last inputs: kept as it is, it would keep those of the whole prompt.
        state.history_BWC = history_BWC.clone()
    return y_BTD


def routed_cache(state: MixerState) -> ThresholdCache | None:
    """The cache in pages of a layer's memory, or None."""
    cache = state.cache if isinstance(state, HamState) else None
    return cache if isinstance(cache, ThresholdCache) else None


def _set_apart(cache: ThresholdCache) -> RoutedTokens:
    cache.paged = RoutedTokens(cache.paged)
    return cache.paged


def _put_pages_in(reading: Reading) -> None:
    if reading.index is None:
        return
    caches = filter(None, map(routed_cache, reading.state.layers))
    stored = store_tokens(reading.prompts, reading.index)
    for cache, paged in zip(caches, stored, strict=True):
        cache.paged = paged


def _take_pages_out(reading: Reading) -> None:
    caches = filter(None, map(routed_cache, reading.state.layers))
    for cache, prompt in zip(caches, reading.prompts, strict=True):
        cache.paged = prompt
