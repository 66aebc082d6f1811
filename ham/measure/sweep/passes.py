"""Whole-sequence work: prefill up to the first token, and a training step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ham.config import TrainConfig
from ham.kernels.speed.clock import Task, capture
from ham.measure.sweep.attention import fastest_first
from ham.measure.sweep.forced import force_routing
from ham.measure.sweep.grid import Cell
from ham.model.decoder import DecoderLM
from ham.model.decoder_state import DecoderState
from ham.model.precision import precision_context
from ham.train.optimiser import make_optimiser, set_learning_rate

WARM_UP = 3
"""Eager calls before a capture: compile, allocate, let the optimiser make its state."""


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
    """Forward, backward and AdamW on random tokens; the learning rate is 0, so weights stay.

    Attributes:
        launch_mode: `cuda_graph` once `capture` has succeeded.
        loss: Of the last call; every replay writes it anew.
    """

    def __init__(self, model: DecoderLM, cell: Cell):
        self.model = model
        self.launch_mode = "eager"
        if cell.fraction is not None:
            force_routing(model, cell.fraction, cell.routing)
        self.optimiser = make_optimiser(model, TrainConfig())
        set_learning_rate(self.optimiser, 0.0)
        for group in self.optimiser.param_groups:
            group["capturable"] = model.device.type == "cuda"
        vocabulary = model.config.vocabulary_size
        shape = (cell.batch, cell.context + 1)
        self.tokens_BT = torch.randint(vocabulary, shape, device=model.device)
        self.replay: Callable[[], object] = self.step

    def step(self) -> Tensor:
        """One optimiser step in the arithmetic of `ham train`; returns the loss."""
        self.optimiser.zero_grad(set_to_none=True)
        device = self.model.device
        with fastest_first(device), precision_context(device):
            loss, _ = self.model.loss(self.tokens_BT[:, :-1], self.tokens_BT[:, 1:])
        loss.backward()
        self.optimiser.step()
        self.loss = loss.detach()
        return self.loss

    def capture(self) -> None:
        """Record the step in a CUDA graph; raises what the capture raises."""
        if self.model.device.type != "cuda":
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.replay = capture(Task(self.step, torch.enable_grad)).replay
        self.launch_mode = "cuda_graph"
