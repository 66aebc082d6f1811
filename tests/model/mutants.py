"""Mixers with one fault each, to see that the rule that should catch it does, alone.

Every one is full attention and a small disturbance; the key of `MUTANTS` is the rule it breaks.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import nn

from ham.baselines.transformer import Transformer
from ham.model.mixer import MixerAux
from ham.model.states import CacheState

SMALL = 1e-3


class ReadsTheNextToken(Transformer):
    def forward(self, x_BTD):
        y_BTD, aux = super().forward(x_BTD)
        return torch.cat((y_BTD[:, :-1] + SMALL * x_BTD[:, 1:], y_BTD[:, -1:]), dim=1), aux


class KeepsItsLastOutput(Transformer):
    last = 0.0

    def forward(self, x_BTD):
        y_BTD, aux = super().forward(x_BTD)
        y_BTD = y_BTD + SMALL * self.last
        self.last = float(y_BTD.detach().mean())
        return y_BTD, aux


class KeepsItsMemory(Transformer):
    """A second sequence goes on in the memory of the first."""

    def init_state(self, batch_size, device, dtype):
        memories = self.__dict__.setdefault("memories", {})
        if (batch_size, dtype) not in memories:
            memories[batch_size, dtype] = super().init_state(batch_size, device, dtype)
        return memories[batch_size, dtype]


class DeclaresOneByteMore(Transformer):
    def state_bytes(self, *arguments):
        declared = super().state_bytes(*arguments)
        return dataclasses.replace(declared, allocated=declared.allocated + 1)


class HoldsADeadParameter(Transformer):
    def __init__(self, shape, options):
        super().__init__(shape, options)
        self.dead = nn.Parameter(torch.ones(3))


class SubtractsTheMeanOfTheBatch(Transformer):
    def forward(self, x_BTD):
        y_BTD, aux = super().forward(x_BTD)
        return y_BTD - SMALL * y_BTD.mean(0), aux

    def prefill(self, x_BTD, state):
        y_BTD, aux = super().prefill(x_BTD, state)
        return y_BTD - SMALL * y_BTD.mean(0), aux


class DividesByTheLength(Transformer):
    def forward(self, x_BTD):
        y_BTD, aux = super().forward(x_BTD)
        return y_BTD + SMALL * x_BTD / x_BTD.norm(dim=-1, keepdim=True), aux

    def prefill(self, x_BTD, state):
        y_BTD, aux = super().prefill(x_BTD, state)
        return y_BTD + SMALL * x_BTD / x_BTD.norm(dim=-1, keepdim=True), aux


class StepsElsewhere(Transformer):
    def step(self, x_BD, state):
        return super().step(x_BD, state) + SMALL * x_BD


class CutsElsewhere(Transformer):
    def prefill(self, x_BTD, state):
        y_BTD, aux = super().prefill(x_BTD, state)
        return y_BTD + SMALL * x_BTD if x_BTD.shape[1] > 1 else y_BTD, aux


class ReversingState(CacheState):
    def select(self, index_B):
        super().select(index_B.flip(0))


class SelectsInReverse(Transformer):
    def init_state(self, *arguments):
        return ReversingState(super().init_state(*arguments).cache)


class BackwardState(CacheState):
    @classmethod
    def join(cls, states):
        return super().join(states[::-1])


class JoinsInReverse(Transformer):
    def init_state(self, *arguments):
        return BackwardState(super().init_state(*arguments).cache)


class HidesATrainedTensor(Transformer):
    def __init__(self, shape, options):
        super().__init__(shape, options)
        self.hidden = [torch.ones(shape.width, requires_grad=True)]

    def forward(self, x_BTD):
        y_BTD, aux = super().forward(x_BTD)
        return y_BTD * self.hidden[0].to(y_BTD.dtype), aux


class GivesAWrongGradient(Transformer):
    def forward(self, x_BTD):
        y_BTD, aux = super().forward(x_BTD)
        return y_BTD + SMALL * (x_BTD - x_BTD.detach()), aux


class ForgetsABuffer(Transformer):
    """What the seed drew is not stored with the weights."""

    def __init__(self, shape, options):
        super().__init__(shape, options)
        self.register_buffer("drawn", torch.rand(shape.width), persistent=False)

    def _attend(self, *arguments):
        return super()._attend(*arguments) * self.drawn


class DrawsWithoutTheSeed(Transformer):
    count = itertools.count()

    def __init__(self, shape, options):
        super().__init__(shape, options)
        generator = torch.Generator().manual_seed(next(self.count))
        self.drawn = nn.Parameter(torch.rand(shape.width, generator=generator))

    def _attend(self, *arguments):
        return super()._attend(*arguments) * self.drawn


class ReturnsFloat32(Transformer):
    def forward(self, x_BTD):
        y_BTD, aux = super().forward(x_BTD)
        return y_BTD.float(), aux


class CostsNothing(Transformer):
    def forward_flops(self, context, kv_fraction=1.0):
        return 0.0


class BranchesOnANumber(Transformer):
    """What Python decides from a tensor's value leaves the graph, and here changes nothing."""

    def forward(self, x_BTD):
        y_BTD, aux = super().forward(x_BTD)
        return (y_BTD if float(y_BTD.detach().norm()) >= 0 else -y_BTD), aux


class CompilesToSomethingElse(Transformer):
    def forward(self, x_BTD):
        y_BTD, aux = super().forward(x_BTD)
        return y_BTD + SMALL * x_BTD if torch.compiler.is_compiling() else y_BTD, aux


class LosesATable(Transformer):
    """What only the constructor computes is not there in a model made to be filled from a file."""

    def __init__(self, shape, options):
        super().__init__(shape, options)
        self.register_buffer("table", torch.linspace(1, 2, shape.width), persistent=False)

    def _attend(self, *arguments):
        return super()._attend(*arguments) * self.table


class SeesItselfOnly(Transformer):
    """Its cache is never read: enough to learn what follows a token, not what stood before it."""

    def forward(self, x_BTD):
        return self.out(self._project(x_BTD, 0)[2].flatten(-2)), MixerAux()

    def prefill(self, x_BTD, state):
        super().prefill(x_BTD, state)
        return self.forward(x_BTD)


class IsLoudUnderAutocast(Transformer):
    def forward(self, x_BTD):
        y_BTD, aux = super().forward(x_BTD)
        return 1e3 * y_BTD if torch.is_autocast_enabled("cpu") else y_BTD, aux


class ClaimsToTakeHints(Transformer):
    uses_hints = True


class ClaimsToRoute(Transformer):
    routes = True


MUTANTS = {
    "interface": (ClaimsToTakeHints, ClaimsToRoute),
    "causality": (ReadsTheNextToken,),
    "fresh": (KeepsItsLastOutput, KeepsItsMemory),
    "bytes_held": (DeclaresOneByteMore,),
    "trained": (HoldsADeadParameter,),
    "batch": (SubtractsTheMeanOfTheBatch,),
    "finite": (DividesByTheLength,),
    "steps": (StepsElsewhere,),
    "pieces": (CutsElsewhere,),
    "reorder": (SelectsInReverse,),
    "join": (JoinsInReverse,),
    "registered": (HidesATrainedTensor,),
    "gradcheck": (GivesAWrongGradient,),
    "state_dict": (ForgetsABuffer,),
    "deterministic": (DrawsWithoutTheSeed,),
    "shapes": (ReturnsFloat32,),
    "flops": (CostsNothing,),
    "autocast": (IsLoudUnderAutocast,),
    "copying": (SeesItselfOnly,),
    "compiled": (BranchesOnANumber, CompilesToSomethingElse),
    "pretrained": (LosesATable,),
}
