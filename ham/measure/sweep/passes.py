"""Whole-sequence work: prefill up to the first token, and a training step."""

from __future__ import annotations

import torch
from torch import Tensor

from ham.config import TrainConfig
from ham.errors import DeviceError
from ham.kernels.sdpa import fastest_first
from ham.measure.sweep.forced import force_routing
from ham.measure.sweep.grid import Cell
from ham.measure.sweep.prefill_graph import GraphPrefill
from ham.model.decoder import DecoderLM
from ham.model.decoder_state import DecoderState
from ham.train.optimiser import make_optimiser
from ham.train.step import COMPILED_STEPS, OptimiserStep, StepResult


class Prefill:
    """Reads a context into an empty memory and gives the first token of each sequence.

    Only the logits of the last position are computed. On a GPU the reading is one CUDA graph once
    it is prepared; a call replays it and then fills the pages of what was routed.

    Args:
        model: In evaluation mode; its weights' dtype is that of the caches.
        cell: Sizes and routing.
        fuse: Have blocks compiled where there is a graph.

    Attributes:
        launch_mode: `cuda_graph` or `eager`.
        note: Why there is no graph although there could be one; None otherwise.
    """

    def __init__(self, model: DecoderLM, cell: Cell, fuse: bool = False):
        self.model = model
        self.fuse = fuse
        self.launch_mode = "eager"
        self.note: str | None = None
        self._state: DecoderState | None = None
        self._graph: GraphPrefill | None = None
        if cell.fraction is not None:
            force_routing(model, cell.fraction, cell.routing)
        vocabulary = model.config.vocabulary_size
        self.tokens_BT = torch.randint(vocabulary, (cell.batch, cell.context), device=model.device)

    def prepare(self) -> None:
        """The calls before the launch mode is the final one."""
        self()
        if self.model.device.type == "cuda":
            self.capture()

    def capture(self) -> None:
        """Let a CUDA graph do the following calls; where it cannot, `note` says why."""
        self._state = None
        graph = GraphPrefill(self.model, *self.tokens_BT.shape, fuse=self.fuse)
        graph.tokens_BT.copy_(self.tokens_BT)
        try:
            graph.capture()
        except DeviceError as error:
            self.note = str(error)
        else:
            self._graph, self.launch_mode = graph, "cuda_graph"

    @property
    def state(self) -> DecoderState | None:
        """The decoding memory that the last call filled."""
        return self._state if self._graph is None else self._graph.reading.state

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The first token of each sequence, `tokens_B`."""
        if self._graph is not None:
            return self._graph()
        # The memory of the call before goes first: two would not fit where one barely does.
        self._state = None
        state = self.model.init_state(self.tokens_BT.shape[0])
        with fastest_first(self.model.device):
            output = self.model.prefill(self.tokens_BT, state, last_only=True)
        self._state = state
        return output.logits_BTV[:, -1].argmax(dim=-1)


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
