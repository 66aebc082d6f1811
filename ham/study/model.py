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
from ham.model.blocks import RMSNorm
from ham.model.mixer import MixerAux, MixerShape, SequenceMixer
from ham.model.registry import mixer_class, parse_options
from ham.study.config import MqarConfig

EMBEDDING_STD = 0.02


class RecallBlock(nn.Module):
    """A mixer with its norm, added to the residual stream."""

    def __init__(self, width: int, mixer: SequenceMixer):
        super().__init__()
        self.mixer_norm = RMSNorm(width)
        self.mixer = mixer

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, MixerAux]:
        """The residual stream after this layer, and the mixer's report."""
        y_BTD, aux = self.mixer(self.mixer_norm(x_BTD))
        return x_BTD + y_BTD, aux


class RecallModel(nn.Module):
    """Embedding, layers, norm, tied read-out at the queries alone.

    `blocks` and `embedding` are named as in `DecoderLM`, so that `ham.model.calibration` can set
    the thresholds.
    """

    def __init__(self, config: MqarConfig, arm: ArmConfig, width: int, kernels: str = "auto"):
        super().__init__()
        options = parse_options(arm.mixer, arm.options, config.training_context)
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
                        max_positions=config.longest,
                        kernels=kernels,
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
    def routes(self) -> bool:
        """Whether any layer routes tokens by a threshold."""
        return any(block.mixer.routes for block in self.blocks)

    def count_parameters(self) -> int:
        """Parameters, the embedding once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, tokens_BT: Tensor, queries_BP: Tensor) -> tuple[Tensor, list[MixerAux]]:
        """Logits at the queries, `logits_BPC`, and the report of each layer."""
        x_BTD = self.embedding(tokens_BT)
        reports = []
        for block in self.blocks:
            x_BTD, aux = block(x_BTD)
            reports.append(aux)
        index_BPD = queries_BP.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1])
        asked_BPD = self.final_norm(x_BTD.gather(1, index_BPD))
        return F.linear(asked_BPD, self.embedding.weight), reports

    def loss(self, tokens_BT: Tensor, queries_BP: Tensor, answers_BP: Tensor) -> Tensor:
        """Mean cross-entropy over the queries in nats, plus what the mixers add."""
        logits_BPC, reports = self(tokens_BT, queries_BP)
        loss = F.cross_entropy(logits_BPC.flatten(0, 1).float(), answers_BP.flatten())
        for aux in reports:
            if aux.loss is not None:
                loss = loss + aux.loss
        return loss

    def end_step(self) -> None:
        """Let the thresholds follow what was observed since the last call."""
        for block in self.blocks:
            block.mixer.end_step()
