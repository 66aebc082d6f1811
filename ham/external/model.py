"""A causal language model of another library as a `ham.model.language_model.LanguageModel`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ham.errors import HamError, UnusableModelError
from ham.external.configuration import ExternalModelConfig, network_of
from ham.external.library import no_kernel_launched, one_line, quiet
from ham.external.memory import UNUSED, ExternalState, cache_bytes, cache_tensors
from ham.external.probe import check_causal, check_trains, reads_pieces
from ham.model.decoder import DecoderOutput, next_token_loss
from ham.model.mixer import StateBytes
from ham.routing import ThresholdController

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")
"""What the libraries call the decoding memory, as an argument and in the output."""

COUNTED = "torch's flop counter"
APPROXIMATE = "6N approximation"


class ExternalLM(nn.Module):
    """A model of `transformers` or of flash-linear-attention.

    Args:
        config: What it was built from or read as.
        network: The library's module.
    """

    routes = False
    routing_layers: Sequence[int] = ()
    controllers: Sequence[ThresholdController] = ()
    needs_unigram_counts = False
    target_fraction = 1.0

    def __init__(self, config: ExternalModelConfig, network: nn.Module):
        super().__init__()
        self.config = config
        self.network = network
        self.library = config.library
        self._takes = set(inspect.signature(network.forward).parameters)
        self._cache_name = next((name for name in CACHE_NAMES if name in self._takes), None)
        self._reads_pieces: bool | None = None
        self._flops: dict[int, float] = {}
        self._whole: dict[int, bool] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def check_runs(self) -> None:
        """Check on a few tokens that it runs where its weights are, and is causal.

        Raises:
            UnusableModelError: If not.
        """
        with quiet():
            check_causal(self)

    def check_trains(self) -> None:
        """Check that it runs, is causal and gives every used weight a gradient where it is.

        Raises:
            UnusableModelError: If not.
        """
        with quiet():
            check_causal(self)
            check_trains(self)

    def forward(self, tokens_BT: Tensor, wanted_BT: Tensor | None = None) -> DecoderOutput:
        """Logits of the next token at every position; `wanted_BT` is for routers, ignored here."""
        self.check_length(tokens_BT.shape[1])
        return DecoderOutput(self._run(tokens_BT, use_cache=False).logits, [])

    def loss(
        self, inputs_BT: Tensor, targets_BT: Tensor, wanted_BT: Tensor | None = None
    ) -> tuple[Tensor, DecoderOutput]:
        """Mean cross-entropy in nats per token; auxiliary losses of the library are left out."""
        output = self(inputs_BT)
        return next_token_loss(output.logits_BTV, targets_BT), output

    def end_step(self) -> None:
        """Nothing follows an optimiser step."""

    def check_scores(self) -> None:
        """There is no router."""

    def set_unigram_counts(self, counts_V: Tensor) -> None:
        """There is no router."""

    def init_state(self, batch_size: int, dtype: torch.dtype | None = None) -> ExternalState:
        """An empty decoding memory; `dtype` is the library's choice.

        Raises:
            UnusableModelError: If the model has no cache, or one that does not continue a sequence
                as reading it at once does, or in which no tensor is found.
        """
        if self._reads_pieces is None:
            with quiet():
                self._reads_pieces = reads_pieces(self)
        return ExternalState.empty(batch_size, self.device)

    def prefill(
        self,
        tokens_BT: Tensor,
        state: ExternalState,
        wanted_BT: Tensor | None = None,
        last_only: bool = False,
    ) -> DecoderOutput:
        """Read T tokens, continuing from `state`; token by token where pieces are not supported."""
        self.check_length(state.longest + tokens_BT.shape[1])
        if state.longest and not self._reads_pieces:
            return self._prefill_by_steps(tokens_BT, state, last_only)
        read = functools.partial(self.read, last_only=last_only)
        return DecoderOutput(state.advance(tokens_BT, read), [])

    def step(
        self, tokens_B: Tensor, state: ExternalState, wanted_B: Tensor | None = None
    ) -> Tensor:
        """Read one token per sequence; returns `logits_BV` of the next one."""
        self.check_length(state.longest + 1)
        return state.advance(tokens_B[:, None], self.read)[:, -1]

    def read(self, tokens_BT: Tensor, cache: Any, last_only: bool = False) -> tuple[Tensor, Any]:
        """Logits and the cache after one call of the library's module.

        Raises:
            UnusableModelError: If it takes or gives no cache.
        """
        if self._cache_name is None:
            raise UnusableModelError(
                f"{self._name()}: its forward takes none of {', '.join(CACHE_NAMES)}, so its cache "
                "can be neither measured nor used"
            )
        given = {self._cache_name: cache} if cache is not None else {}
        if last_only and "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        output = self._run(tokens_BT, use_cache=True, **given)
        found = _cache_of(output)
        if next(cache_tensors(found), None) is None:
            raise UnusableModelError(
                f"{self._name()}: no tensor is found in its cache ({type(found).__name__}), so its "
                "bytes cannot be measured"
            )
        logits_BTV = output.logits
        return logits_BTV[:, -1:] if last_only else logits_BTV, found

    def held_share(self, position: int) -> float | None:
        """1 where its cache is keys and values alone, as many as there are tokens; else None.

        Measured: the bytes after `position` tokens over those after half of them.
        """
        if position not in self._whole:
            half = max(1, position // 2)
            short, whole = self._measured_bytes(half), self._measured_bytes(position)
            only_kv = set(whole) <= {"kv", "positions", UNUSED}
            grows = whole.get("kv", 0) * half == short.get("kv", 0) * position
            self._whole[position] = only_kv and grows
        return 1.0 if self._whole[position] else None

    def planned_bytes(self, context: int) -> int:
        """Bytes of the cache after `context` tokens in bfloat16; 0 where it cannot be traced."""
        try:
            with quiet(), torch.no_grad():
                tokens_BT = torch.zeros(1, context, dtype=torch.int64, device="meta")
                output = self._traced(tokens_BT, self._outline.to(torch.bfloat16))
        except Exception:  # as in `_counted_flops`
            return 0
        return sum(n for kind, n in cache_bytes(_cache_of(output)).items() if kind != UNUSED)

    def declared_bytes(self, position: int, cache_fractions: Sequence[Any]) -> StateBytes | None:
        """There is no formula: its bytes are measured."""
        return None

    def count_parameters(self) -> int:
        """Trained parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def flops_source(self) -> str:
        """How `forward_flops` is found: counted on the model's operators, or 2 N per token.

        The counter sees matrix products, convolutions and attention, the masked half of attention
        included; kernels of a library's own it does not see. Where the model cannot be traced
        without memory, a forward pass is taken as 2 N FLOPs per token and a training step as 6 N
        (Kaplan et al. 2020, section 2.1).
        """
        return COUNTED if self._counted_flops(1) else APPROXIMATE

    def forward_flops(self, context: int, kv_fraction: float = 1.0) -> float:
        """FLOPs of one forward pass over one sequence; see `flops_source`."""
        if context not in self._flops:
            approximate = 2.0 * self.count_parameters() * context
            self._flops[context] = self._counted_flops(context) or approximate
        return self._flops[context]

    def decode_flops(self, position: int, kv_fraction: float = 1.0) -> float:
        """FLOPs of one more token: the difference of two forward passes."""
        return self.forward_flops(position + 1) - self.forward_flops(position)

    def write(self, folder: Path) -> Path:
        """Write a Hugging Face folder without tokenizer; returns the weights' file."""
        with quiet():
            self.network.save_pretrained(folder, max_shard_size="1000TB")
        return folder / "model.safetensors"

    def check_length(self, length: int) -> None:
        """Check that the model may read a sequence of `length` tokens.

        Raises:
            UnusableModelError: If it is longer than `max_positions`.
        """
        if length > self.config.max_positions:
            raise UnusableModelError(
                f"{self._name()}: a sequence of {length} tokens is longer than the model's "
                f"max_positions {self.config.max_positions}"
            )

    def _prefill_by_steps(
        self, tokens_BT: Tensor, state: ExternalState, last_only: bool
    ) -> DecoderOutput:
        logits = [self.step(tokens_B, state) for tokens_B in tokens_BT.unbind(dim=1)]
        return DecoderOutput(torch.stack(logits[-1:] if last_only else logits, dim=1), [])

    def _run(self, tokens_BT: Tensor, **options: Any) -> Any:
        """The library's output object; whatever the library raises becomes one message."""
        given = {name: value for name, value in options.items() if name in self._takes}
        try:
            return self.network(input_ids=tokens_BT, return_dict=True, **given)
        except (HamError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # kernels, shapes and packages fail in their own ways
            raise UnusableModelError(
                f"{self._name()} fails on {tokens_BT.device.type}: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error

    @torch.inference_mode()
    def _measured_bytes(self, context: int) -> dict[str, int]:
        tokens_BT = torch.zeros(1, context, dtype=torch.int64, device=self.device)
        return cache_bytes(self.read(tokens_BT, None, last_only=True)[1])

    def _counted_flops(self, context: int) -> float:
        """0 where the model cannot be traced on tensors without memory."""
        try:
            with quiet(), FlopCounterMode(display=False) as counter, torch.no_grad():
                tokens_BT = torch.zeros(1, context, dtype=torch.int64, device="meta")
                self._traced(tokens_BT, self._outline)
            return float(counter.get_total_flops())
        except Exception:  # a kernel or a branch on data that needs real tensors
            return 0.0

    @property
    def _outline(self) -> nn.Module:
        """The same network without memory."""
        with torch.device("meta"):
            return network_of(self.network.config, self.config.model_type).eval()

    def _traced(self, tokens_BT: Tensor, outline: nn.Module) -> Any:
        with torch.device("meta"), no_kernel_launched():
            return outline(input_ids=tokens_BT, return_dict=True)

    def _name(self) -> str:
        return f"model {self.config.arm!r} ({self.config.mixer})"


def _cache_of(output: Any) -> Any:
    return next((output[name] for name in CACHE_NAMES if output.get(name) is not None), None)
