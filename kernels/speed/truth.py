"""The truth at sizes where the token-by-token reference would take minutes.

Float64 on the rounded inputs that the providers get, gradients of a weighted sum of the read-out.

- Recurrences: the vectorised `torch` provider, on slices of batch and heads that fit into memory;
  what slices share (decay rates, b and c of several heads) adds up.
- Attention: a softmax over the routed keys for one block of queries and one sequence at a time.

Nothing is left out: outputs and gradients are those of the full shape. `check_truth` compares this
with the reference at small sizes, in the same process, before anything rests on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ham.kernels.gated_delta_rule import gated_delta_rule_scored
from ham.kernels.registry import REFERENCE, TORCH, find_operation
from ham.kernels.speed.problems import (
    AttentionProblem,
    Inputs,
    Problem,
    RuleProblem,
    SsdProblem,
)
from ham.kernels.verify import SEED, name_outputs, relative_error

# Elements of one float64 tensor of a slice. Up to 36 such tensors are alive at once (27 for ssd),
# counted on a CPU at K = V = 128: 9.7 GB.
SLICE_ELEMENTS = 1 << 25
QUERY_BLOCK = 256
TRUTH_TOLERANCE = 1e-9
SMALL: tuple[Problem, ...] = (
    RuleProblem("B2_T130_H3_D16"),
    SsdProblem("B2_T130_H4_P16_S24_G1"),
    AttentionProblem("B2_T130_H3_D16", 0.3),
    AttentionProblem("B2_T130_H3_D16", 1.0),
)


@dataclass
class Truth:
    """What a provider should give: tensors by name, gradients as `d <input>`."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def axes_of(name: str) -> str:
    """The axis letters of a tensor's name: `q_BTHK` has `BTHK`."""
    return name.rpartition("_")[2]


def short_name(name: str) -> str:
    """`q_BTHK` without its axes."""
    return name.rpartition("_")[0]


def weight_for(problem: Problem, inputs: Inputs) -> Tensor:
    """The gradient that enters at the read-out of a problem: fixed random numbers, `[B, T, H, V]`.

    It has the dtype of the values and the heads of the read-out.
    """
    value = next(value for name, value in inputs.items() if name[:2] in ("v_", "x_"))
    whole = next(name for name in ("beta_BTH", "dt_BTH", "q_BTHK") if name in inputs)
    shape = (*value.shape[:2], inputs[whole].shape[2], value.shape[-1])
    generator = torch.Generator(value.device).manual_seed(SEED)
    return torch.randn(shape, generator=generator, device=value.device).to(value.dtype)


def compute_truth(problem: Problem, inputs: Inputs, weight: Tensor) -> Truth:
    """Outputs and gradients in float64."""
    if problem.operation == "routed_attention":
        return _attention(inputs, weight)
    return _sliced(problem.operation, inputs, weight)


def _exact_call(operation: str, inputs: Inputs) -> dict[str, Tensor]:
    if operation == "gated_delta_rule":
        return name_outputs(gated_delta_rule_scored(*inputs.values(), provider=TORCH))
    return name_outputs(find_operation(operation).run(*inputs.values(), provider=TORCH))


def _sliced(operation: str, inputs: Inputs, weight: Tensor) -> Truth:
    truth = Truth()
    for name, value in inputs.items():
        truth.gradients[f"d {short_name(name)}"] = torch.zeros_like(value, dtype=torch.float64)
    batch, _, heads, _ = weight.shape
    for batches, chosen in _slices(weight):
        index = {
            name: _index(name, value, batches, chosen, heads) for name, value in inputs.items()
        }
        leaves = {
            name: value[index[name]].double().requires_grad_() for name, value in inputs.items()
        }
        outputs = _exact_call(operation, leaves)
        read_out = next(iter(outputs.values()))
        gradients = torch.autograd.grad(
            read_out, list(leaves.values()), weight[batches, :, chosen].double()
        )
        for name, gradient in zip(leaves, gradients, strict=True):
            truth.gradients[f"d {short_name(name)}"][index[name]] += gradient
        for name, value in outputs.items():
            _place(truth.outputs, name, value.detach(), batches, chosen, batch, heads)
    return truth


def _slices(weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Ranges of batch and heads with at most `SLICE_ELEMENTS` elements, whole heads at least."""
    batch, time, heads, size = weight.shape
    per_head = time * size
    step = max(1, min(heads, SLICE_ELEMENTS // per_head))
    while heads % step:
        step -= 1
    rows = max(1, min(batch, SLICE_ELEMENTS // (per_head * step)))
    for start in range(0, batch, rows):
        for first in range(0, heads, step):
            yield slice(start, start + rows), slice(first, first + step)


def _index(name: str, value: Tensor, batches: slice, chosen: slice, heads: int) -> tuple:
    """Where the slice lies in an input; groups shared by heads of the slice are taken whole."""
    parts = []
    for axis, letter in enumerate(axes_of(name)):
        if letter == "B":
            parts.append(batches)
        elif letter == "H":
            parts.append(chosen)
        elif letter == "G":
            share = heads // value.shape[axis]
            parts.append(slice(chosen.start // share, -(-chosen.stop // share)))
        else:
            parts.append(slice(None))
    return tuple(parts)


def _place(
    outputs: dict[str, Tensor],
    name: str,
    value: Tensor,
    batches: slice,
    chosen: slice,
    batch: int,
    heads: int,
) -> None:
    """Put an output of a slice where it belongs: heads are axis 1 of states, axis 2 elsewhere."""
    axis = 1 if name == "final_state" else 2
    if name not in outputs:
        shape = list(value.shape)
        shape[0], shape[axis] = batch, heads
        outputs[name] = value.new_empty(shape)
    where = [slice(None)] * value.ndim
    where[0], where[axis] = batches, chosen
    outputs[name][tuple(where)] = value


def _attention(inputs: Inputs, weight: Tensor) -> Truth:
    q, k, v, routed_BT = inputs.values()
    made = [torch.zeros_like(x, dtype=torch.float64) for x in (weight, q, k, v)]
    for sequence in range(q.shape[0]):
        _attend_sequence(q, k, v, routed_BT, weight, made, sequence)
    o, *gradients = made
    names = [f"d {short_name(name)}" for name in inputs][:3]
    return Truth({"o": o}, dict(zip(names, gradients, strict=True)))


def _attend_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed_BT: Tensor,
    weight: Tensor,
    made: list[Tensor],
    sequence: int,
) -> None:
    """Fill in one sequence's part of o, dq, dk and dv."""
    o, dq, dk, dv = (tensor[sequence] for tensor in made)
    positions_N = routed_BT[sequence].nonzero().squeeze(1)
    time, heads, size = q[sequence].shape
    share = heads // k.shape[2]
    packed_k, packed_v = (x[sequence][positions_N].double().transpose(0, 1) for x in (k, v))
    total_k, total_v = torch.zeros_like(packed_k), torch.zeros_like(packed_v)
    query_T = torch.arange(time, device=q.device)
    for start in range(0, time, QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        past_QN = positions_N <= query_T[rows, None]
        keys = int(past_QN[-1].sum())
        if keys == 0:
            continue
        leaves = [
            q[sequence, rows].double().transpose(0, 1).requires_grad_(),
            packed_k[:, :keys].clone().requires_grad_(),
            packed_v[:, :keys].clone().requires_grad_(),
        ]
        q_HQK, k_HNK, v_HNV = leaves[0], *(x.repeat_interleave(share, 0) for x in leaves[1:])
        hidden_QN = ~past_QN[:, :keys]
        score_HQN = (q_HQK @ k_HNK.mT * size**-0.5).masked_fill(hidden_QN, -torch.inf)
        # A query without any key would be a softmax over nothing but -inf, which is NaN.
        empty_Q1 = hidden_QN.all(-1, keepdim=True)
        weight_HQN = score_HQN.masked_fill(empty_Q1, 0.0).softmax(-1).masked_fill(hidden_QN, 0.0)
        o_HQV = weight_HQN @ v_HNV
        gradients = torch.autograd.grad(
            o_HQV, leaves, weight[sequence, rows].double().transpose(0, 1)
        )
        o[rows] = o_HQV.detach().transpose(0, 1)
        dq[rows] = gradients[0].transpose(0, 1)
        total_k[:, :keys] += gradients[1]
        total_v[:, :keys] += gradients[2]
    dk[positions_N], dv[positions_N] = total_k.transpose(0, 1), total_v.transpose(0, 1)


def check_truth(
    operation: str,
    device: torch.device,
    compute: Callable[[Problem, Inputs, Tensor], Truth] = compute_truth,
) -> str | None:
    """Compare the truth with the float64 reference at small sizes; says what is off, or None."""
    for problem in SMALL:
        if problem.operation != operation:
            continue
        inputs = problem.inputs(torch.float64, device, SEED)
        weight = weight_for(problem, inputs)
        errors = _errors(compute(problem, inputs, weight), _reference(problem, inputs, weight))
        worst = max(errors, key=lambda name: errors[name])
        if not errors[worst] <= TRUTH_TOLERANCE:
            return f"the truth is off the reference by {errors[worst]:.1e} in {worst}"
    return None


def _errors(made: Truth, expected: Truth) -> Mapping[str, float]:
    pairs = [(made.outputs, expected.outputs), (made.gradients, expected.gradients)]
    return {
        name: relative_error(got[name], value)
        for got, wanted in pairs
        for name, value in wanted.items()
    }


def _reference(problem: Problem, inputs: Inputs, weight: Tensor) -> Truth:
    leaves = {
        name: value.clone().requires_grad_(value.is_floating_point())
        for name, value in inputs.items()
    }
    if problem.operation == "gated_delta_rule":
        outputs = name_outputs(gated_delta_rule_scored(*leaves.values(), provider=REFERENCE))
    else:
        run = find_operation(problem.operation).run
        outputs = name_outputs(run(*leaves.values(), provider=REFERENCE))
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(next(iter(outputs.values())), list(wanted.values()), weight)
    return Truth(
        {name: value.detach() for name, value in outputs.items()},
        {f"d {short_name(name)}": g for name, g in zip(wanted, gradients, strict=True)},
    )
