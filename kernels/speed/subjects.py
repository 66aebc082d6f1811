"""Who is timed on a problem: what is called, and on which tensors."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ham.errors import ConfigError
from ham.kernels.gated_delta_rule import gated_delta_rule_scored
from ham.kernels.peers import flex
from ham.kernels.registry import AUTO, REFERENCE, Provider, find_operation, operations
from ham.kernels.speed import routing_parts
from ham.kernels.speed.problems import COMPONENTS, DENSE, Inputs, Problem
from ham.kernels.verify import name_outputs

PREPACKED = "flex_prepacked"
SCORE = "cosine"
DENSE_PROVIDERS = ("sdpa_cudnn", "sdpa_flash")

Call = Callable[[Inputs], dict[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """One provider on one problem.

    Attributes:
        name: The provider's name in rows.
        provider: Where it is registered, or None for parts of routing.
        call: Runs it on the problem's inputs; outputs by name, the read-out first.
        prepare: Makes the tensors that are timed from the inputs, outside of the timed region.
        timed: Runs it on prepared tensors.
        labels: What rows say about it.
    """

    name: str
    provider: Provider | None
    call: Call
    prepare: Callable[[Inputs], dict[str, Any]]
    timed: Callable[[dict[str, Any]], dict[str, Tensor]]
    labels: dict[str, str] = field(default_factory=dict)
    unguarded: bool = False

    @contextlib.contextmanager
    def setting(self) -> Iterator[None]:
        """What must hold around every call, forward and backward."""
        with contextlib.ExitStack() as stack:
            if self.provider is not None:
                stack.enter_context(self.provider.setting())
                if self.unguarded and self.provider.unguarded is not None:
                    stack.enter_context(self.provider.unguarded())
            yield

    def without_guard(self) -> Subject:
        """The same with a peer's own refusal switched off; labelled so."""
        return replace(self, unguarded=True, labels={**self.labels, "guard": "bypassed"})

    @property
    def has_guard(self) -> bool:
        """Whether it may refuse what it could do."""
        return self.provider is not None and self.provider.unguarded is not None


def provider_names(problem: Problem) -> tuple[str, ...]:
    """Every name that can be timed on a problem, in the order of tables."""
    if problem.operation in COMPONENTS:
        return tuple(routing_parts.providers(problem.operation))
    registered = list(find_operation(problem.operation).providers)
    if problem.operation != "routed_attention":
        return tuple(registered)
    if problem.fraction == DENSE:
        return tuple(registered)
    return (*registered, PREPACKED)


def default_names(problem: Problem) -> tuple[str, ...]:
    """What is timed unless others are named: all but the reference, which loops over tokens.

    Full attention is there as the attention that routing replaces, so only dense kernels run it,
    and they run nothing else.
    """
    names = [name for name in provider_names(problem) if name != REFERENCE]
    if problem.operation != "routed_attention":
        return tuple(names)
    dense = problem.fraction == DENSE
    return tuple(name for name in names if (name in DENSE_PROVIDERS) == dense)


def choose_names(problem: Problem, named: Sequence[str] | None) -> tuple[str, ...]:
    """The default names, or those of `named` that the problem has."""
    if not named:
        return default_names(problem)
    if problem.operation == "routed_attention":
        return tuple(name for name in default_names(problem) if name in named)
    return tuple(name for name in provider_names(problem) if name in named)


def check_names(named: Sequence[str] | None) -> None:
    """Raise `ConfigError` for a name that no operation has."""
    known = {PREPACKED, *(name for one in operations().values() for name in one.providers)}
    known.update(name for part in COMPONENTS for name in routing_parts.providers(part))
    for name in named or ():
        if name == AUTO or name not in known:
            raise ConfigError(f"unknown provider {name!r}; known: {', '.join(sorted(known))}")


def make_subject(problem: Problem, name: str) -> Subject:
    """The subject called `name` on a problem."""
    if problem.operation in COMPONENTS:
        part = routing_parts.providers(problem.operation)[name]
        return Subject(name, None, part, dict, part)
    operation = find_operation(problem.operation)
    if name == PREPACKED:
        return Subject(
            name,
            operation.providers["flex"],
            lambda inputs: _run(operation.run, inputs, "flex"),
            _prepack,
            _attend_prepacked,
            {"includes": "attention alone, keys packed and mask built before"},
        )
    provider = operation.providers[name]
    run, labels = operation.run, {}
    if problem.operation == "gated_delta_rule":
        labels = {"score": "none"}
        if provider.kind != "peer":
            run, labels = gated_delta_rule_scored, {"score": SCORE}
    if problem.operation == "routed_attention" and name == "flex":
        labels = {"includes": "packing, mask and attention"}
    if provider.kind == "peer" and provider.version is not None:
        labels["peer_version"] = provider.version() or "not installed"

    def call(inputs: Inputs) -> dict[str, Tensor]:
        return _run(run, inputs, name)

    return Subject(name, provider, call, dict, call, labels)


def refusal(subject: Subject, problem: Problem, inputs: Inputs) -> str | None:
    """Why a subject cannot do a problem on the device of its inputs, or None."""
    device = next(iter(inputs.values())).device
    if subject.provider is None:
        return routing_parts.refusal(subject.name, device)
    if not subject.provider.available(device):
        where = "a CPU" if device.type == "cpu" else "this device"
        return f"not available: its package is missing or it cannot run on {where}"
    return subject.provider.refusal(named_arguments(problem, inputs))


def named_arguments(problem: Problem, inputs: Inputs) -> dict[str, Any]:
    """The inputs under the parameter names of the public function."""
    parameters = inspect.signature(find_operation(problem.operation).run).parameters
    return dict(zip(parameters, inputs.values(), strict=False))


def _run(run: Callable[..., Any], inputs: Inputs, provider: str) -> dict[str, Tensor]:
    return name_outputs(run(*inputs.values(), provider=provider))


def _prepack(inputs: Inputs) -> dict[str, Any]:
    q_BTHK, k, v, routed_BT = inputs.values()
    with torch.no_grad():
        packed = flex.pack(k, v, routed_BT, backward=True)
    return {
        "q_BTHK": q_BTHK,
        "k_BNGK": packed.k_BNGK,
        "v_BNGV": packed.v_BNGV,
        "mask": packed.mask,
    }


def _attend_prepacked(prepared: dict[str, Any]) -> dict[str, Tensor]:
    return {"o": flex.attend(*prepared.values(), None)}
