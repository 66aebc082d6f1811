"""The decoder that every architecture shares: pre-norm blocks of mixer and SwiGLU, tied embedding.

Only the sequence mixer differs between the arms of a comparison. Letters as in `ham.model.mixer`;
`tokens_BT` holds int64 token ids.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ham.errors import ConfigError
from ham.files import atomic_writer
from ham.measure.cost import linear_flops
from ham.model.blocks import RMSNorm, SwiGLU
from ham.model.capabilities import instance_faults, require_sound
from ham.model.decoder_state import DecoderState
from ham.model.mixer import (
    MixerAux,
    MixerShape,
    MixerState,
    RoutingHints,
    SequenceMixer,
    StateBytes,
)
from ham.model.model_config import ModelConfig
from ham.model.positions import Positions
from ham.model.precision import cache_dtype
from ham.model.registry import mixer_class, parse_options
from ham.routing import ThresholdController, follow, raise_on_bad_scores
from ham.routing.router import UnigramSurprise

EMBEDDING_MULTIPLE = 64
"""The vocabulary is padded to this many rows, so that matrix units see aligned sizes."""

INITIAL_STD_TIMES_ROOT_WIDTH = 0.55
"""GPT-2's 0.02 at its width of 768, carried to other widths as 1 / sqrt(width)."""

IGNORED = -100
"""Target that adds nothing to a loss."""


@dataclass
class DecoderOutput:
    """Logits and what each layer reported."""

    logits_BTV: Tensor
    aux: list[MixerAux]

    def kv_fraction_per_layer(self) -> list[float]:
        """Realised share of routed tokens in each layer that routes."""
        shares = [aux.kept_share_BT() for aux in self.aux]
        return [float(share_BT.mean()) for share_BT in shares if share_BT is not None]

    def cache_fractions(self) -> list[float | list[float]]:
        """The same for every cache: a list per layer where each head has a cache of its own."""
        fractions: list[float | list[float]] = []
        for aux in self.aux:
            if aux.routed_BTH is not None:
                fractions.append(aux.routed_BTH.double().mean((0, 1)).tolist())
            elif aux.routed_BT is not None:
                fractions.append(float(aux.routed_BT.double().mean()))
        return fractions

    def kv_fraction(self) -> float | None:
        """Mean over the routing layers; None if none routes."""
        per_layer = self.kv_fraction_per_layer()
        return sum(per_layer) / len(per_layer) if per_layer else None


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats per target, in float32 or wider.

    Args:
        logits_BTV: Of any floating dtype.
        targets_BT: Int64; `IGNORED` where nothing is to be predicted. Without any target the loss
            and its gradient are 0: torch's mean would be 0 / 0, and one micro-batch of it would
            make the whole step NaN.
    """
    logits_NV = logits_BTV.flatten(0, 1)
    logits_NV = logits_NV.float() if logits_NV.element_size() < 4 else logits_NV
    targets_N = targets_BT.flatten()
    total = F.cross_entropy(logits_NV, targets_N, reduction="sum", ignore_index=IGNORED)
    return total / count_targets(targets_N).clamp(min=1)


def count_targets(targets: Tensor) -> Tensor:
    """How many entries are to be predicted, an int64 scalar on their device."""
    return (targets != IGNORED).sum()


def add_auxiliary_losses(loss: Tensor, reports: Sequence[MixerAux]) -> Tensor:
    """`loss` with those that layers report."""
    for aux in reports:
        if aux.loss is not None:
            loss = loss + aux.loss
    return loss


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, mlp_width: int, mixer: SequenceMixer):
        super().__init__()
        self.mixer_norm = RMSNorm(width)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(width)
        self.mlp = SwiGLU(width, mlp_width)

    def forward(self, x_BTD: Tensor, hints: RoutingHints | None = None) -> tuple[Tensor, MixerAux]:
        """Whole sequence from an empty memory."""
        y_BTD, aux = self.mixer(self.mixer_norm(x_BTD), **self._told(hints))
        return self._finish(x_BTD + y_BTD), aux

    def prefill(
        self, x_BTD: Tensor, state: MixerState, hints: RoutingHints | None = None
    ) -> tuple[Tensor, MixerAux]:
        """T tokens continuing from `state`."""
        y_BTD, aux = self.mixer.prefill(self.mixer_norm(x_BTD), state, **self._told(hints))
        return self._finish(x_BTD + y_BTD), aux

    def step(self, x_BD: Tensor, state: MixerState, hints: RoutingHints | None = None) -> Tensor:
        """One token continuing from `state`."""
        y_BD = self.mixer.step(self.mixer_norm(x_BD), state, **self._told(hints))
        return self._finish(x_BD + y_BD)

    def _told(self, hints: RoutingHints | None) -> dict[str, RoutingHints | None]:
        return {"hints": hints} if self.mixer.uses_hints else {}

    def _finish(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.mlp_norm(x))


class DecoderLM(nn.Module):
    """A causal language model around one kind of sequence mixer, or two kinds in chosen layers.

    Raises:
        ConfigError: For an unknown mixer or options it refuses.
    """

    library = None
    flops_source = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        rows = math.ceil(config.vocabulary_size / EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE
        self.embedding = nn.Embedding(rows, config.width)
        self.blocks = nn.ModuleList()
        for layer in range(config.layers):
            shape = MixerShape(
                config.width,
                config.heads,
                layer,
                config.layers,
                config.max_positions,
                config.kernels,
                config.vocabulary_size,
                config.seed,
            )
            name, values = config.layer_mixer(layer)
            options = parse_options(name, values, config.context)
            mixer = mixer_class(name)(shape, options)
            require_sound(name, instance_faults(mixer))
            self.blocks.append(Block(config.width, config.mlp_width, mixer))
        self.final_norm = RMSNorm(config.width)
        self._initialise()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def routes(self) -> bool:
        """Whether any layer routes tokens by a threshold."""
        return any(block.mixer.routes for block in self.blocks)

    @property
    def routing_layers(self) -> list[int]:
        """Indices of the layers that route, from the bottom up."""
        return [layer for layer, block in enumerate(self.blocks) if block.mixer.routes]

    @property
    def controllers(self) -> list[ThresholdController]:
        """The thresholds of the layers that route, from the bottom up."""
        mixers = [block.mixer for block in self.blocks]
        return [mixer.controller for mixer in mixers if mixer.controller is not None]

    @property
    def target_fraction(self) -> float:
        """Share of tokens that its routers are to keep, mean over their layers; 1 without one."""
        targets = [controller.target for controller in self.controllers]
        return sum(targets) / len(targets) if targets else 1.0

    def check_trains(self) -> None:
        """Every mixer has a path on every device."""

    def forward(self, tokens_BT: Tensor, wanted_BT: Tensor | None = None) -> DecoderOutput:
        """Logits of the next token at every position, each sequence read from its start.

        Args:
            tokens_BT: Token ids.
            wanted_BT: Boolean; for an oracle router, which tokens a later question asks for.
        """
        self.check_length(tokens_BT.shape[1])
        x_BTD, hints = self.embedding(tokens_BT), RoutingHints(tokens_BT, wanted_BT)
        reports = []
        for block in self.blocks:
            x_BTD, aux = block(x_BTD, hints)
            reports.append(aux)
        return DecoderOutput(self._logits(x_BTD), reports)

    def loss(
        self, inputs_BT: Tensor, targets_BT: Tensor, wanted_BT: Tensor | None = None
    ) -> tuple[Tensor, DecoderOutput]:
        """Mean cross-entropy in nats per token, plus the auxiliary losses of the mixers."""
        output = self(inputs_BT, wanted_BT)
        loss = next_token_loss(output.logits_BTV, targets_BT)
        return add_auxiliary_losses(loss, output.aux), output

    def head_loss(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, from what the last block gave."""
        return next_token_loss(self._logits(x_BTD), targets_BT)

    def init_state(self, batch_size: int, dtype: torch.dtype | None = None) -> DecoderState:
        """Empty decoding memories; KV in `dtype`, by default that of autocast or the weights."""
        dtype = dtype or cache_dtype(self.embedding.weight)
        return DecoderState(
            [block.mixer.init_state(batch_size, self.device, dtype) for block in self.blocks],
            Positions.zeros(batch_size, self.device),
        )

    def prefill(
        self,
        tokens_BT: Tensor,
        state: DecoderState,
        wanted_BT: Tensor | None = None,
        last_only: bool = False,
    ) -> DecoderOutput:
        """Read T tokens at once, continuing from `state`, which is updated.

        With `last_only` the logits are those after the last token alone, `[B, 1, V]`: those of a
        long prompt and a large vocabulary would not fit into memory.
        """
        self.check_length(state.longest + tokens_BT.shape[1])
        x_BTD, hints = self.embedding(tokens_BT), RoutingHints(tokens_BT, wanted_BT)
        reports = []
        for block, layer_state in zip(self.blocks, state.layers, strict=True):
            x_BTD, aux = block.prefill(x_BTD, layer_state, hints)
            reports.append(aux)
        state.positions.advance(tokens_BT.shape[1])
        return DecoderOutput(self._logits(x_BTD[:, -1:] if last_only else x_BTD), reports)

    def step(self, tokens_B: Tensor, state: DecoderState, wanted_B: Tensor | None = None) -> Tensor:
        """Read one token per sequence; returns `logits_BV` of the next one."""
        self.check_length(state.longest + 1)
        x_BD = self.embedding(tokens_B)
        hints = RoutingHints(tokens_B[:, None], None if wanted_B is None else wanted_B[:, None])
        for block, layer_state in zip(self.blocks, state.layers, strict=True):
            x_BD = block.step(x_BD, layer_state, hints)
        state.positions.advance(1)
        return self._logits(x_BD)

    def end_step(self) -> None:
        """Called once after each optimiser step: thresholds follow what they observed."""
        follow(self.controllers)
        for block in self.blocks:
            if block.mixer.controller is None:
                block.mixer.end_step()

    def check_scores(self) -> None:
        """Raise if a routing score was NaN or infinite since the last call; one device sync.

        Raises:
            RoutingError: Names each layer and score, and how many.
        """
        raise_on_bad_scores(self.controllers)

    @property
    def needs_unigram_counts(self) -> bool:
        """Whether a router must be told how often each token occurs in the training text."""
        return bool(self._unigram_tables())

    def set_unigram_counts(self, counts_V: Tensor) -> None:
        """Tell lexical routers how often each token id occurs in the training text.

        Args:
            counts_V: One count for each of `vocabulary_size` ids.

        Raises:
            ValueError: If there is another number of counts.
        """
        for table in self._unigram_tables():
            table.set_counts(counts_V.to(self.device))

    def _unigram_tables(self) -> list[UnigramSurprise]:
        return [module for module in self.modules() if isinstance(module, UnigramSurprise)]

    def count_parameters(self) -> int:
        """Trained parameters, the embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward_flops(self, context: int, kv_fraction: float = 1.0) -> float:
        """FLOPs of one forward pass over one sequence, the logits included."""
        mixers = sum(block.mixer.forward_flops(context, kv_fraction) for block in self.blocks)
        return mixers + context * self._dense_flops_per_token()

    def decode_flops(self, position: int, kv_fraction: float = 1.0) -> float:
        """FLOPs of one decode step with `position` tokens already read."""
        mixers = sum(block.mixer.decode_flops(position, kv_fraction) for block in self.blocks)
        return mixers + self._dense_flops_per_token()

    def state_bytes(
        self,
        position: int,
        kv_fraction: float | Sequence[float | Sequence[float]] = 1.0,
        element_size: int = 2,
    ) -> StateBytes:
        """Declared bytes of one sequence's decoding memory, summed over layers.

        Args:
            position: Tokens read.
            kv_fraction: Share of them routed, the same in every layer that routes, or one for
                each of these layers (`DecoderOutput.cache_fractions`).
            element_size: Bytes of a KV element.

        Raises:
            ValueError: If there is another number of fractions than of layers that route.
        """
        mixers = [block.mixer for block in self.blocks]
        routing = sum(mixer.routes for mixer in mixers)
        shared = isinstance(kv_fraction, float | int)
        given = [kv_fraction] * routing if shared else list(kv_fraction)
        if len(given) != routing:
            raise ValueError(f"{len(given)} fractions for {routing} layers that route")
        fractions = iter(given)
        layers = [
            dataclasses.asdict(
                mixer.state_bytes(position, next(fractions) if mixer.routes else 1.0, element_size)
            )
            for mixer in mixers
        ]
        return StateBytes(**{name: sum(layer[name] for layer in layers) for name in layers[0]})

    def held_share(self, position: int) -> float | None:
        """Share of the `position` tokens read that is in the caches, where a schedule decides.

        The mean over layers; None if one of them has no such share.
        """
        shares = [block.mixer.held_share(position) for block in self.blocks]
        return None if None in shares else sum(shares) / len(shares)

    def planned_bytes(self, context: int) -> int:
        """Bytes of one sequence's memory after `context` tokens, keys and values in 16 bits."""
        return self.state_bytes(context, self.target_fraction).allocated

    def declared_bytes(
        self, position: int, cache_fractions: Sequence[float | Sequence[float]]
    ) -> StateBytes:
        """`state_bytes` with keys and values in the dtype of `init_state`."""
        element_size = cache_dtype(self.embedding.weight).itemsize
        return self.state_bytes(position, cache_fractions or 1.0, element_size)

    def write(self, folder: Path) -> Path:
        """Write weights and thresholds, atomically; returns the file."""
        weights = folder / "model.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with atomic_writer(weights, "wb") as handle:
            handle.write(save(tensors))
        return weights

    def check_length(self, length: int) -> None:
        """Check that the model may read a sequence of `length` tokens.

        Raises:
            ConfigError: If it is longer than `max_positions`.
        """
        if length > self.config.max_positions:
            raise ConfigError(
                f"a sequence of {length} tokens is longer than the model's "
                f"max_positions {self.config.max_positions}"
            )

    def _dense_flops_per_token(self) -> float:
        width, hidden = self.config.width, self.config.mlp_width
        mlp = linear_flops(1, width, 2 * hidden) + linear_flops(1, hidden, width)
        return self.config.layers * mlp + linear_flops(1, width, self.embedding.num_embeddings)

    def _logits(self, x: Tensor) -> Tensor:
        logits = F.linear(self.final_norm(x), self.embedding.weight)
        return logits[..., : self.config.vocabulary_size]

    def _initialise(self) -> None:
        """Normal matrices; those that write to the residual stream shrunk by sqrt(2 L) (GPT-2)."""
        std = INITIAL_STD_TIMES_ROOT_WIDTH / math.sqrt(self.config.width)
        residual_std = std / math.sqrt(2 * self.config.layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes = name.endswith((".out", ".down"))
                nn.init.normal_(module.weight, std=residual_std if writes else std)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)
