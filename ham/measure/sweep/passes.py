"""Whole-sequence work: prefill up to the first token, and a training step."""

from __future__ import annotations

import torch
from torch import Tensor

from ham.config import TrainConfig
from ham.kernels.sdpa import fastest_first
from ham.measure.sweep.forced import force_routing
from ham.measure.sweep.grid import Cell
from ham.model.decoder import DecoderLM
from ham.model.decoder_state import DecoderState
from ham.train.optimiser import make_optimiser
from ham.train.step import COMPILED_STEPS, OptimiserStep, StepResult


class Prefill:
    """Reads a context into an empty memory and gives the first token of each sequence.

    Only the logits of the last position are computed. Launched eagerly for every model: HAM's
    cache grows by what was routed, which the host must know.

    Attributes:
        state: The decoding memory that the last call filled.
    """

    def __init__(self, model: DecoderLM, cell: Cell):
        self.model = model
        self.dtype = model.embedding.weight.dtype
        self.state: DecoderState | None = None
        if cell.fraction is not None:
            force_routing(model, cell.fraction, cell.routing)
        vocabulary = model.config.vocabulary_size
        self.tokens_BT = torch.randint(vocabulary, (cell.batch, cell.context), device=model.device)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """The first token of each sequence, `tokens_B`."""
        # The memory of the call before goes first: two would not fit where one barely does.
        self.state = None
        state = self.model.init_state(self.tokens_BT.shape[0], self.dtype)
        x_BTD = self.model.embedding(self.tokens_BT)
        with fastest_first(self.model.device):
            for block, layer_state in zip(self.model.blocks, state.layers, strict=True):
                x_BTD, _ = block.prefill(x_BTD, layer_state)
        self.state = state
        last_BD = self.model.final_norm(x_BTD[:, -1])
        logits_BV = last_BD @ self.model.embedding.weight.T
        return logits_BV[:, : self.model.config.vocabulary_size].argmax(dim=-1)


class TrainingStep:
    """Optimiser steps of `ham train` on random tokens; the learning rate is 0, so weights stay.

    On a GPU every model is compiled and its whole step is one CUDA graph.
    """

    def __init__(self, model: DecoderLM, cell: Cell):
        if cell.fraction is not None:
            force_routing(model, cell.fraction, cell.routing)
        settings = TrainConfig(compile=model.device.type == "cuda")
        self.optimise = OptimiserStep(model, make_optimiser(model, settings), settings)
        vocabulary = model.config.vocabulary_size
        shape = (2, cell.batch, cell.context)
        self.inputs_BT, self.targets_BT = torch.randint(vocabulary, shape, device=model.device)

    def step(self) -> StepResult:
        """One step."""
        return self.optimise(self.inputs_BT, self.targets_BT, 0.0)

    def prepare(self) -> None:
        """The steps before the launch mode is the final one."""
        for _ in range(COMPILED_STEPS + 2):
            self.step()
