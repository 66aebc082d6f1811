"""The kernels of the gated delta rule for Hopper, against float64 and against the plain kernels.

No interpreter runs Gluon, so what needs the kernels needs a GPU of compute capability 9. Their
choice, and the identities that the gradient kernel rests on, are tested everywhere. Tests on the
GPU share few combinations of head sizes and options, as each takes seconds to compile.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from delta_rule_checks import LIMIT, make_inputs, without_gluon, worst
from triton_device import CUDA, DEVICE, interpreter

from ham.kernels.gate.pool import clean_environment
from ham.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_scored, triton_tiles
from ham.kernels.gated_delta_rule.cases import GatedDeltaRuleCase as Case
from ham.kernels.triton_target import A100, H100, Target, stand_in
from ham.routing import head_scores, reduce_heads

__all__ = ["interpreter"]

Tensors = dict[str, torch.Tensor]
gpu = pytest.mark.gpu
SIZES = tuple(itertools.product((64, 128), repeat=2))
HOPPER = {"hopper_walk", "hopper_walk_back", "hopper_gradients"}
MIXED = Case(1, 330, 4, 128, 128, initial_state=True, key_heads=2, lengths=(130, 0, 199, 1))
SCORE_CASE = Case(2, 1000, 4, 128, 128)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No interpreter, and what is remembered about Triton's version forgotten afterwards."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton_tiles.gluon_known.cache_clear()
    yield
    triton_tiles.gluon_known.cache_clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the Hopper launchers called; memory that kernels write to starts as NaN."""
    if not (CUDA and triton_tiles.use_gluon(torch.empty(0, device=DEVICE).bfloat16(), 64, 64)):
        pytest.skip("needs a GPU of compute capability 9 and a Triton whose Gluon is known")
    from ham.kernels.gated_delta_rule import hopper_gradients, hopper_reverse, hopper_walk

    names: list[str] = []

    def watch(module: object, name: str) -> None:
        launch = getattr(module, name)

        def watched(*args: object, **options: object) -> object:
            names.append(name)
            return launch(*args, **options)

        monkeypatch.setattr(module, name, watched)

    watch(hopper_walk, "hopper_walk")
    watch(hopper_reverse, "hopper_walk_back")
    watch(hopper_gradients, "hopper_gradients")
    poison(monkeypatch)
    return names


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(function):
        def make(*args: object, **options: object) -> torch.Tensor:
            made = function(*args, **options)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return make

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def results(inputs: Tensors, provider: str) -> Tensors:
    """Read-outs, final state and all gradients of both; nothing asks for predictions."""
    leaves = {
        name: value.clone().requires_grad_(value.is_floating_point())
        for name, value in inputs.items()
    }
    made = gated_delta_rule_scored(**leaves, score=None, provider=provider)
    outputs = {"o": made.o_BTHV, "final_state": made.final_state_BHKV}
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(part.shape, generator=generator) for part in outputs.values()]
    weights[0] = weights[0].bfloat16()
    torch.autograd.backward(
        list(outputs.values()),
        [w.to(o) for w, o in zip(weights, outputs.values(), strict=True)],
    )
    gradients = {f"d{n}": leaf.grad for n, leaf in leaves.items() if leaf.requires_grad}
    return {name: part.detach() for name, part in outputs.items()} | gradients


def differences(received: Tensors, expected: Tensors) -> dict[str, float]:
    """Norm of the difference over the norm, 0/0 counted as 0; where all is 0, over 1e-12.

    The gradient kernel writes of the order of 2^-60 where a beta of 0 makes gradients vanish.
    """
    errors = {}
    for name, value in expected.items():
        difference = (received[name].double() - value.double()).norm().item()
        errors[name] = difference / (value.double().norm().item() or 1e-12) if difference else 0.0
    return errors


def check(inputs: Tensors) -> None:
    wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    errors = differences(results(inputs, "triton"), results(wide, "torch"))
    assert worst(errors) < LIMIT[torch.bfloat16], errors


@gpu
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gpu_matches_float64(launched: list[str], sizes: tuple[int, int]) -> None:
    for case in (
        Case(1, 1, 3, *sizes, initial_state=True),
        Case(3, 63, 5, *sizes),
        Case(1, 64, 3, *sizes, initial_state=True),
        Case(3, 65, 2, *sizes, gates="extreme"),
        Case(2, 200, 6, *sizes, initial_state=True, gates="extreme", key_heads=2),
        Case(1, 1000, 2, *sizes),
    ):
        launched.clear()
        check(make_inputs(case, torch.bfloat16))
        assert set(launched) == HOPPER, case


@gpu
@pytest.mark.parametrize("beta", [0.0, 1e-8, 1.0])
@pytest.mark.parametrize("log_decays", [(-10.0, -20.0, 0.0), (0.0,)], ids=str)
def test_gpu_gates_at_their_ends(
    launched: list[str], beta: float, log_decays: tuple[float, ...]
) -> None:
    """Strong decays among none at all, so that states pass some tokens and not others."""
    inputs = make_inputs(Case(1, 200, 5, 128, 128, initial_state=True), torch.bfloat16)
    shape = inputs["beta_BTH"].shape
    kind = torch.randint(len(log_decays), shape, generator=torch.Generator().manual_seed(2))
    inputs["log_decay_BTH"] = torch.tensor(log_decays)[kind].to(DEVICE)
    inputs["beta_BTH"] = torch.full_like(inputs["beta_BTH"], beta)
    check(inputs)


@gpu
@pytest.mark.parametrize("lengths", [(), MIXED.lengths], ids=str)
def test_gpu_segments_and_sequences(
    launched: list[str], monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    """Of 6 chunks in 5 segments the last two are empty; slow decays pass segments."""
    from ham.kernels.gated_delta_rule import triton_sequences

    inputs = make_inputs(Case(**{**vars(MIXED), "lengths": lengths}), torch.bfloat16)
    inputs["log_decay_BTH"] = inputs["log_decay_BTH"] * 0.1
    for segments in (1, 2, 5):
        monkeypatch.setattr(triton_sequences, "segments_of", lambda *args, n=segments: n)
        launched.clear()
        check(inputs)
        assert set(launched) == HOPPER - ({"hopper_gradients"} if lengths else set())


@gpu
@pytest.mark.parametrize("score", ["cosine", "l2", "committed"])
def test_gpu_scores(launched: list[str], score: str) -> None:
    """Mean error at most 0.005; at most 1 % of decisions change at a quarter routed."""
    inputs = make_inputs(SCORE_CASE, torch.bfloat16)
    wide = {name: value.double() for name, value in inputs.items()}
    prediction_BTHV = gated_delta_rule(**wide, provider="torch").prediction_BTHV
    expected_BTH = head_scores(score, prediction_BTHV, wide["v_BTHV"], wide["beta_BTH"])
    for reduction in ("min", "mean", "max"):
        made = gated_delta_rule_scored(
            **inputs, score=score, reduction=reduction, provider="triton"
        )
        expected_BT = reduce_heads(expected_BTH, reduction)
        error = (made.score_BTH.double() - expected_BTH).abs().mean().item()
        reduced = made.score_BT.double()
        routed, wanted = (x >= x.quantile(0.75) for x in (reduced, expected_BT))
        flipped = (routed != wanted).double().mean().item()
        print(f"{score} {reduction}: mean error {error:.5f}, decisions flipped {flipped:.5f}")
        assert error <= 0.005 and flipped <= 0.01
    assert set(launched) == {"hopper_walk"}


@gpu
def test_gpu_same_inputs_give_same_bits(launched: list[str]) -> None:
    """A difference between runs would be a race."""
    inputs = make_inputs(Case(4, 1000, 16, 128, 128, initial_state=True), torch.bfloat16)
    first = results(inputs, "triton")
    assert set(launched) == HOPPER
    for _ in range(4):
        again = results(inputs, "triton")
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


@gpu
def test_gpu_agrees_with_the_plain_kernels(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(2, 300, 4, 128, 128, initial_state=True, key_heads=2)
    inputs = make_inputs(case, torch.bfloat16)
    received = results(inputs, "triton")
    assert set(launched) == HOPPER
    launched.clear()
    without_gluon(monkeypatch)
    expected = results(inputs, "triton")
    assert launched == []
    assert worst(differences(received, expected)) < LIMIT[torch.bfloat16]


@gpu
@pytest.mark.parametrize(
    ("size", "dtype"), [(32, torch.bfloat16), (64, torch.float32)], ids=["D32", "float32"]
)
def test_gpu_what_the_plain_kernels_do(launched: list[str], size: int, dtype: torch.dtype) -> None:
    results(make_inputs(Case(1, 65, 2, size, size), dtype), "triton")
    assert launched == []


@gpu
def test_gpu_predictions_take_the_plain_walks(launched: list[str]) -> None:
    inputs = make_inputs(Case(1, 65, 2, 64, 64), torch.bfloat16)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    output = gated_delta_rule(**leaves, provider="triton")
    assert launched == []
    (output.o_BTHV.float().sum() + output.prediction_BTHV.sum()).backward()
    assert launched == ["hopper_gradients"]


@pytest.mark.parametrize(
    ("target", "dtype", "sizes", "chosen"),
    [
        *((H100, torch.bfloat16, sizes, True) for sizes in SIZES),
        (Target((9, 0), 114), torch.bfloat16, (128, 128), True),
        (A100, torch.bfloat16, (128, 128), False),
        (Target((10, 0), 148), torch.bfloat16, (128, 128), False),
        (H100, torch.float32, (128, 128), False),
        (H100, torch.bfloat16, (32, 64), False),
        (H100, torch.bfloat16, (128, 256), False),
    ],
)
def test_which_launches_are_for_hopper(
    compiled: None,
    monkeypatch: pytest.MonkeyPatch,
    target: Target,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    chosen: bool,
) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", "3.6.0")
    with stand_in(target):
        assert triton_tiles.use_gluon(torch.empty(0, dtype=dtype), *sizes) == chosen


@pytest.mark.parametrize("version", ["3.5.1", "3.7.0", "3.60.0"])
def test_an_unknown_triton_takes_the_plain_kernels(
    compiled: None, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    with stand_in(H100):
        assert not triton_tiles.use_gluon(torch.empty(0, dtype=torch.bfloat16), 128, 128)


def test_the_interpreter_takes_the_plain_kernels(
    compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with stand_in(H100):
        assert not triton_tiles.use_gluon(torch.empty(0, dtype=torch.bfloat16), 128, 128)


def gradients_of_a_chunk(
    q_CK: torch.Tensor,
    k_CK: torch.Tensor,
    do_CV: torch.Tensor,
    r_CV: torch.Tensor,
    w_CV: torch.Tensor,
    state_KV: torch.Tensor,
    dstate_KV: torch.Tensor,
    c_C: torch.Tensor,
    beta_C: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """The identities of `hopper_gradients.py`: of q, k, log decay and beta."""
    gamma_CC = (c_C[:, None] - c_C).tril().exp().tril()
    gamma_C1, to_end_C1 = c_C.exp()[:, None], (c_C[-1] - c_C).exp()[:, None]
    f_CC = scale * gamma_CC * (do_CV @ r_CV.T)
    g_CC = -(gamma_CC * (w_CV @ r_CV.T)).tril(-1)
    write_CK = to_end_C1 * (r_CV @ dstate_KV.T)
    dq_CK = scale * gamma_C1 * (do_CV @ state_KV.T) + (f_CC * beta_C) @ k_CK
    a_CK = -gamma_C1 * (w_CV @ state_KV.T) + (g_CC * beta_C) @ k_CK
    b_CK = write_CK + f_CC.T @ q_CK + g_CC.T @ k_CK
    dbeta_C = (k_CK * b_CK).sum(1)
    dc_C = (q_CK * dq_CK).sum(1) + (k_CK * a_CK).sum(1) - beta_C * dbeta_C
    dc_C[-1] += beta_C @ (k_CK * write_CK).sum(1) + c_C[-1].exp() * (state_KV * dstate_KV).sum()
    dlog_decay_C = dc_C.flip(0).cumsum(0).flip(0)
    return dq_CK, a_CK + beta_C[:, None] * b_CK, dlog_decay_C, dbeta_C


@pytest.mark.parametrize("gates", ["typical", "extreme"])
def test_identities_of_the_gradient_kernel(gates: str) -> None:
    """In float64, on the gradients of r and of the states that autograd finds in the recurrence."""
    case = Case(1, 130, 1, 16, 24, initial_state=True, gates=gates)
    inputs = make_inputs(case, torch.float64)
    leaves = {name: value.cpu().clone().requires_grad_() for name, value in inputs.items()}
    made = gated_delta_rule_scored(**leaves, score=None, provider="torch")
    weights = [torch.randn_like(part) for part in (made.o_BTHV, made.final_state_BHKV)]
    torch.autograd.backward([made.o_BTHV, made.final_state_BHKV], weights)
    q, k, v, decay, beta = (part.detach()[0, :, 0] for part in list(leaves.values())[:5])
    do, dfinal = weights[0][0, :, 0], weights[1][0, 0]
    dv = leaves["v_BTHV"].grad[0, :, 0]

    states = [leaves["initial_state_BHKV"].detach()[0, 0].requires_grad_()]
    residuals = []
    for t in range(case.time):
        decayed = decay[t].exp() * states[-1]
        residuals.append(v[t] - k[t] @ decayed)
        states.append(decayed + beta[t] * torch.outer(k[t], residuals[-1]))
    scale = case.key_size**-0.5
    o = torch.stack([scale * q[t] @ states[t + 1] for t in range(case.time)])
    ends = states[0 : case.time : 64] + states[-1:]
    loss = (o * do).sum() + (states[-1] * dfinal).sum()
    dstates = torch.autograd.grad(loss, ends[1:], retain_graph=True)
    r = torch.stack(residuals).detach()
    parts = []
    for m, dstate in enumerate(dstates):
        at = slice(64 * m, min(64 * m + 64, case.time))
        # The gradient of a state counts what is read from it later, not within its own chunk.
        if at.stop < case.time:
            after = (o[at.stop :] * do[at.stop :]).sum() + (states[-1] * dfinal).sum()
            (dstate,) = torch.autograd.grad(after, ends[m + 1], retain_graph=True)
        else:
            dstate = dfinal
        chunk = (q[at], k[at], do[at], r[at], dv[at], ends[m].detach(), dstate)
        parts.append(gradients_of_a_chunk(*chunk, decay[at].cumsum(0), beta[at], scale))
    names = ("q_BTHK", "k_BTHK", "log_decay_BTH", "beta_BTH")
    for name, received in zip(names, map(torch.cat, zip(*parts, strict=True)), strict=True):
        torch.testing.assert_close(received, leaves[name].grad[0, :, 0], atol=1e-11, rtol=1e-9)


SAVING_WALK = """
import torch
from ham.kernels.compile_cases import CompileCase
from ham.kernels.gate.record import compile_launch, record
from ham.kernels.gate.targets import parse_targets
from ham.kernels.gated_delta_rule import triton_tiles
from ham.kernels.gated_delta_rule.triton_forward import walk
from ham.kernels.gated_delta_rule.triton_sequences import sequences_of

def launch():
    x = torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16)
    square = torch.zeros(2, 2, 64, 64, dtype=x.dtype)
    gates = triton_tiles.Gates(torch.zeros(2, 2, 3, 64), square, torch.zeros(2, 2))
    tile = triton_tiles.choose_tile("saving_walk", x.dtype, 64, 64)
    initial = torch.zeros(1, 2, 64, 64)
    made = (x, x, x, gates, sequences_of(x, None), initial, 1.0, tile, 1)
    walk(*made, prediction=False, score="", save=True)

(target,) = parse_targets("sm_90")
for each in record(CompileCase("saving walk with initial state", launch), target):
    compile_launch(each)
    print(each.kernel)
"""


def test_saving_walk_with_an_initial_state_compiles() -> None:
    """It once did not in bfloat16, as one variable held pointers to two dtypes."""
    done = subprocess.run(
        [sys.executable, "-c", SAVING_WALK],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["walk_kernel"]
