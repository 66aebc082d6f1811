"""The model of the study: layers of one mixer without an MLP, and a tied embedding.

Zoology's model (arXiv 2312.04927) with the project's mixers: pre-norm residual layers whose state
mixer is the identity, no positions but those of the mixer. Letters as in `ham.model.mixer`; P
queries of an example, C classes of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ham.config import ArmConfig
from ham.kernels.runs import takes_runs
from ham.model.blocks import RMSNorm
from ham.model.mixer import MixerAux, MixerShape, RoutingHints, SequenceMixer
from ham.model.registry import mixer_class, parse_options
from ham.routing import ThresholdController, follow
from ham.study.config import MqarConfig, Task
from ham.study.data import Batch, Examples

EMBEDDING_STD = 0.02
_cross_entropy = takes_runs()(F.cross_entropy)


class RecallBlock(nn.Module):
    """A mixer with its norm, added to the residual stream."""

    def __init__(self, width: int, mixer: SequenceMixer):
        super().__init__()
        self.mixer_norm = RMSNorm(width)
        self.mixer = mixer

    def forward(self, x_BTD: Tensor, hints: RoutingHints | None = None) -> tuple[Tensor, MixerAux]:
        """The residual stream after this layer, and the mixer's report."""
        told = {"hints": hints} if self.mixer.uses_hints else {}
        y_BTD, aux = self.mixer(self.mixer_norm(x_BTD), **told)
        return x_BTD + y_BTD, aux


class RecallModel(nn.Module):
    """Embedding, layers, norm, tied read-out at the queries alone.

    `blocks` and `embedding` are named as in `DecoderLM`, so that `ham.model.calibration` can set
    the thresholds.
    """

    def __init__(
        self, config: MqarConfig, arm: ArmConfig, task: Task, width: int, kernels: str = "auto"
    ):
        super().__init__()
        options = parse_options(arm.mixer, arm.options, config.training_context(task))
        self.embedding = nn.Embedding(config.vocabulary_size, width)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        self.blocks = nn.ModuleList(
            RecallBlock(
                width,
                mixer_class(arm.mixer)(
                    MixerShape(
                        width=width,
                        heads=config.heads,
                        layer=layer,
                        layers=config.layers,
                        max_positions=config.longest(task),
                        kernels=kernels,
                        vocabulary_size=config.vocabulary_size,
                    ),
                    options,
                ),
            )
            for layer in range(config.layers)
        )
        self.final_norm = RMSNorm(width)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def controllers(self) -> list[ThresholdController]:
        """The thresholds of the layers that route, from the bottom up."""
        mixers = [block.mixer for block in self.blocks]
        return [mixer.controller for mixer in mixers if mixer.controller is not None]

    @property
    def slots(self) -> list[int | None]:
        """Size of each layer's cache in tokens where that is fixed (budget `bounded`)."""
        return [getattr(block.mixer.options, "slots", None) for block in self.blocks]

    def count_parameters(self) -> int:
        """Parameters, the embedding once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, examples: Examples | Batch) -> tuple[Tensor, list[MixerAux]]:
        """Logits at the queries, `logits_BPC`, and the report of each layer."""
        hints = RoutingHints(examples.tokens_NT, examples.wanted_NT)
        x_BTD = self.embedding(examples.tokens_NT)
        reports = []
        for block in self.blocks:
            x_BTD, aux = block(x_BTD, hints)
            reports.append(aux)
        index_BPD = examples.queries_NP.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1])
        asked_BPD = self.final_norm(x_BTD.gather(1, index_BPD))
        return F.linear(asked_BPD, self.embedding.weight), reports

    def loss(self, examples: Examples | Batch) -> Tensor:
        """Mean cross-entropy over the queries in nats, plus what the mixers add."""
        logits_BPC, reports = self(examples)
        logits_NC, answers_N = logits_BPC.flatten(0, 1).float(), examples.answers_NP.flatten()
        loss = _cross_entropy(logits_NC, answers_N, reduction="none").mean()
        for aux in reports:
            if aux.loss is not None:
                loss = loss + aux.loss
        return loss

    def end_step(self) -> None:
        """Let the thresholds follow what was observed since the last call."""
        follow(self.controllers)
