"""A decoder whose whole step is one CUDA graph, beside which the caches grow.

The graph reads and writes fixed tensors: the tokens and positions of the batch, recurrent states,
page tables, counts. Between steps `ham.paging.GrowthManager` puts new pages into the tables
from counts that it reads without waiting, so memory follows the routed tokens. Where there is no
GPU the same launches run one by one (in Triton's interpreter), which is how they are tested.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ham.decoding.layers import RULE, FusedHam, FusedLayer, FusedRule, StepInputs, cast, refusal
from ham.errors import ConfigError, NotFiniteError
from ham.kernels.decode.arguments import (
    ACTIVATIONS,
    NAN_SCORES,
    NO_SLOT,
    DecodeScratch,
    Pages,
)
from ham.kernels.decode.blocks import add_rms_norm, silu_multiply
from ham.kernels.decode.tiles import choose_tile
from ham.kernels.triton_target import triton_available
from ham.layer import HamMixer, HamState
from ham.model.decoder import DecoderLM
from ham.model.decoder_state import DecoderState
from ham.model.mixer import MixerState
from ham.model.positions import Positions
from ham.model.precision import cache_dtype
from ham.model.states import RecurrentState
from ham.paging.cache import PagedKVCache
from ham.paging.growth import GrowthManager


def unsupported(model: DecoderLM) -> str | None:
    """Why a model cannot decode by fused kernels, in a few words, or None if it can."""
    if not isinstance(model, DecoderLM):
        return "its layers are those of another library"
    if not triton_available(model.device):
        return f"Triton cannot run on {model.device}"
    dtype = cache_dtype(model.embedding.weight)
    if dtype not in ACTIVATIONS:
        return f"it computes in {dtype}; fused are {', '.join(map(str, ACTIVATIONS))}"
    for index, block in enumerate(model.blocks):
        reason = refusal(block.mixer)
        if reason is not None:
            return f"layer {index}: {reason}"
    return None


class GraphDecoder:
    """Continues the sequences of a decoding state, one token each per step.

    Args:
        model: In evaluation mode. Its weights are read when the decoder is made.
        state: What the prefill left; the decoder takes it over. `release` gives it back.

    Raises:
        ConfigError: If `unsupported(model)`.
    """

    def __init__(self, model: DecoderLM, state: DecoderState):
        reason = unsupported(model)
        if reason is not None:
            raise ConfigError(f"this model cannot decode in a CUDA graph: {reason}")
        self.model = model
        on_gpu = model.device.type == "cuda"
        self.name = "fused kernels in a CUDA graph" if on_gpu else "fused kernels"
        self.rows = list(range(len(state.positions.lengths)))
        self.lengths = list(state.positions.lengths)
        dtype = cache_dtype(model.embedding.weight)
        with torch.inference_mode(False), torch.no_grad():
            self._make(state, dtype)
            self._graph = self._capture()
        self._inputs.active_B.fill_(1)

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Read one token per sequence; returns `logits_BV` of the next one.

        The device is not waited for. The logits are overwritten by the next step.

        Raises:
            ConfigError: For a sequence that is as long as the model can read.
            CachePoolFullError: When the page pool's limit is reached.
        """
        self.model.check_length(max(self.lengths) + 1)
        whole = len(self.rows) == len(self._inputs.tokens_B)
        if whole:
            self._inputs.tokens_B.copy_(tokens_B)
        else:
            self._inputs.tokens_B.index_copy_(0, self._rows_R, tokens_B)
        if self._pages is not None:
            self._pages.before_step()
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        if self._pages is not None:
            self._pages.after_step()
        self.lengths = [length + 1 for length in self.lengths]
        return self._logits_BV if whole else self._logits_BV[self._rows_R]

    def select(self, index: Sequence[int]) -> None:
        """Keep the sequences `index`, increasing; the places of the others stay idle."""
        chosen = [self.rows[place] for place in index]
        leaving = [row for row in self.rows if row not in set(chosen)]
        self.lengths = [self.lengths[place] for place in index]
        self.rows = chosen
        for row in leaving:
            self._inputs.active_B[row] = 0
            if self._pages is not None:
                self._pages.free(*self._cache_rows(row))
        self._rows_R = torch.tensor(chosen, device=self.model.device)

    def kept(self, places: Sequence[int]) -> dict[int, int]:
        """Tokens in the caches of the sequences `places` by layer; waits for the device."""
        if self._pages is None:
            return {}
        counts_LR = self._pages.counts()
        rows = [cache_row for place in places for cache_row in self._cache_rows(self.rows[place])]
        return {
            layer: round(counts_LR[nth, rows].sum() / self._rows_per_sequence)
            for nth, layer in enumerate(self._ham_layers)
        }

    def bytes_allocated(self) -> dict[str, int]:
        """Bytes of the decoding memory by kind, counted on the tensors."""
        held = {} if self._pages is None else self._pages.tensors()
        states = [layer.states() for layer in self._layers]
        held["recurrent"] = [state_BHKV for state_BHKV, _ in states]
        held["conv"] = [history_BWC for _, history_BWC in states]
        return {kind: sum(tensor.nbytes for tensor in tensors) for kind, tensors in held.items()}

    def check(self) -> None:
        """Raise if a step met a score that is NaN or lacked a page; waits for the device.

        Raises:
            NotFiniteError: For NaN scores.
            RuntimeError: If a routed token found no page, a defect of this project.
        """
        if self._pages is None:
            return
        faults = self._scratch.faults_2.tolist()
        if faults[NAN_SCORES]:
            raise NotFiniteError(
                f"{faults[NAN_SCORES]} routing scores were NaN while decoding; the model's weights "
                "or the numbers it computes with are broken"
            )
        if faults[NO_SLOT]:
            raise RuntimeError(f"{faults[NO_SLOT]} routed tokens found no page")

    @torch.no_grad()
    def release(self) -> DecoderState:
        """The decoding state of the present sequences; the decoder is of no use afterwards."""
        self.check()
        self._graph = None
        rows_R = torch.tensor(self.rows, dtype=torch.int64, device=self.model.device)
        caches = [] if self._pages is None else self._pages.to_caches()
        states = [self._released(index, caches, rows_R) for index in range(len(self._old))]
        return DecoderState(states, self._positions())

    def _released(self, index: int, caches: list[PagedKVCache], rows_R: Tensor) -> MixerState:
        state_BHKV, history_BWC = (part[rows_R] for part in self._layers[index].states())
        if index not in self._ham_layers:
            return RecurrentState(state_BHKV, history_BWC)
        cache = self._old[index].cache
        cache.paged = caches[self._ham_layers.index(index)]
        cache.select(rows_R)
        return HamState(state_BHKV, history_BWC, cache, self._positions())

    def _positions(self) -> Positions:
        return Positions(self.lengths, self.model.device)

    def _make(self, state: DecoderState, dtype: torch.dtype) -> None:
        model, device, batch = self.model, self.model.device, len(self.rows)
        self._old = state.layers
        self._rows_R = torch.arange(batch, device=device)
        self._inputs = StepInputs(
            torch.zeros(batch, dtype=torch.int64, device=device),
            state.positions.tensor_B.clone(),
            # Idle while kernels are compiled and the graph is recorded: no memory moves then.
            torch.zeros(batch, dtype=torch.int8, device=device),
            dtype,
        )
        self._pages, self._ham_layers, self._rows_per_sequence = None, [], 1
        self._make_pages(state, dtype)
        self._layers = [self._layer(index, dtype) for index in range(len(model.blocks))]
        self._mlp = [
            (cast(block.mlp.up.weight, dtype), cast(block.mlp.down.weight, dtype))
            for block in model.blocks
        ]
        self._norms = [
            cast(norm.weight, dtype)
            for block in model.blocks
            for norm in (block.mixer_norm, block.mlp_norm)
        ] + [cast(model.final_norm.weight, dtype)]
        self._head = cast(model.embedding.weight, dtype)
        width = model.config.width
        self._x_BD = torch.zeros(batch, width, dtype=model.embedding.weight.dtype, device=device)
        self._normed_BD = torch.zeros(batch, width, dtype=dtype, device=device)
        self._hidden_BF = torch.zeros(batch, model.config.mlp_width, dtype=dtype, device=device)
        self._logits_BV = torch.zeros(
            batch, model.config.vocabulary_size, dtype=dtype, device=device
        )

    def _make_pages(self, state: DecoderState, dtype: torch.dtype) -> None:
        """One manager for the caches of all HAM layers."""
        model, batch = self.model, len(self.rows)
        self._ham_layers = [
            index for index, block in enumerate(model.blocks) if isinstance(block.mixer, HamMixer)
        ]
        if not self._ham_layers:
            return
        caches = [state.layers[index].cache for index in self._ham_layers]
        self._rows_per_sequence = caches[0].rows_per_sequence
        self._pages = GrowthManager.from_caches(
            [cache.paged for cache in caches], model.config.max_positions
        )
        mixer = model.blocks[self._ham_layers[0]].mixer
        shape, expected = mixer.shape, mixer.options.target * model.config.max_positions
        self._tile = choose_tile(batch, shape.heads, int(expected), model.device)
        self._scratch = DecodeScratch.make(
            batch,
            shape.heads,
            shape.head_dim,
            shape.head_dim,
            dtype,
            model.device,
            splits=self._tile.splits,
            per_head=self._rows_per_sequence > 1,
        )

    def _layer(self, index: int, dtype: torch.dtype) -> FusedLayer:
        mixer, state = self.model.blocks[index].mixer, self._old[index]
        if mixer.registered_name == RULE:
            return FusedRule(mixer, state, self._inputs)
        nth = self._ham_layers.index(index)
        pages = Pages(
            self._pages.page_table_LBP[nth],
            self._pages.counts_LB[nth],
            self._pages.layout.page_tokens,
            dtype,
        )
        return FusedHam(mixer, state, self._inputs, pages, self._scratch, self._tile)

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """Compile and record the step; None without a GPU."""
        if self.model.device.type != "cuda":
            return None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph

    def _step(self) -> None:
        """The launches of one step."""
        with torch.autocast(self.model.device.type, enabled=False):
            x_BD, normed_BD = self._x_BD, self._normed_BD
            x_BD.copy_(F.embedding(self._inputs.tokens_B, self.model.embedding.weight))
            add_rms_norm(x_BD, None, self._norms[0], None, normed_BD)
            for index, (layer, (up, down)) in enumerate(zip(self._layers, self._mlp, strict=True)):
                mlp_norm, next_norm = self._norms[2 * index + 1 : 2 * index + 3]
                add_rms_norm(x_BD, layer.step(normed_BD), mlp_norm, x_BD, normed_BD)
                silu_multiply(F.linear(normed_BD, up), self._hidden_BF)
                branch_BD = F.linear(self._hidden_BF, down)
                add_rms_norm(x_BD, branch_BD, next_norm, x_BD, normed_BD)
            logits_BV = F.linear(normed_BD, self._head)
            self._logits_BV.copy_(logits_BV[:, : self.model.config.vocabulary_size])
            self._inputs.positions_B.add_(self._inputs.active_B)

    def _cache_rows(self, row: int) -> range:
        return range(row * self._rows_per_sequence, (row + 1) * self._rows_per_sequence)
