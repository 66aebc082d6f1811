"""Problems of the speed run: shapes, inputs, floors against measured anchors, truth, choice."""

from __future__ import annotations

import pytest
import torch

from ham.errors import ConfigError
from ham.kernels.speed import routing_parts, truth
from ham.kernels.speed.ceilings import Ceilings, floor_of
from ham.kernels.speed.problems import (
    OPERATIONS,
    AttentionProblem,
    Problem,
    RoutingProblem,
    RuleProblem,
    SsdProblem,
    choose_problems,
    make_problems,
    parse_shape,
)
from ham.kernels.speed.subjects import (
    PREPACKED,
    check_names,
    choose_names,
    default_names,
    make_subject,
    named_arguments,
    provider_names,
    refusal,
)
from ham.kernels.speed.targets import PREPACKED as PREPACKED_TARGET
from ham.kernels.speed.targets import TARGETS
from ham.kernels.speed.truth import Truth, check_truth, compute_truth, weight_for

CPU = torch.device("cpu")
H100 = Ceilings(copy_bytes=3021e9, matmul_flops=723e12)
RULE = RuleProblem("B2_T10_H4_D8")


def test_shapes() -> None:
    assert parse_shape("B8_T4096_H16_D128") == {"B": 8, "T": 4096, "H": 16, "D": 128}
    for wrong in ("B8xT4096", "B0_T1_H1_D1", "b8"):
        with pytest.raises(ConfigError, match="not of the form"):
            parse_shape(wrong)
    with pytest.raises(ConfigError, match="must name the sizes B, T, H, P, S, G"):
        make_problems("ssd", "B8_T4096_H16_D128")


def test_default_problems() -> None:
    problems = choose_problems(None, None, quick=False)
    assert [sum(one.operation == name for one in problems) for name in OPERATIONS] == [
        3,
        3,
        8,
        6,
        6,
    ]
    quick = choose_problems(None, None, quick=True)
    assert [(one.operation, one.fraction) for one in quick] == [
        ("gated_delta_rule", None),
        ("ssd", None),
        ("routed_attention", 0.25),
        ("routed_attention", 1.0),
        ("route_index", 0.25),
        ("route_pack", 0.25),
    ]


def test_named_problems() -> None:
    shapes = ["B1_T64_H2_D16", "B1_T64_H2_P16_S8_G1"]
    chosen = choose_problems(["gated_delta_rule", "ssd"], shapes, quick=False)
    assert [one.shape for one in chosen] == shapes
    with pytest.raises(ConfigError, match="unknown operation 'conv'"):
        choose_problems(["conv"], None, quick=False)
    with pytest.raises(ConfigError, match="must name the sizes"):
        choose_problems(["ssd"], shapes[:1], quick=False)


@pytest.mark.parametrize(
    ("problem", "mode", "milliseconds"),
    [
        (RuleProblem("B8_T4096_H16_D128"), "forward", 0.178),
        (RuleProblem("B8_T4096_H16_D64"), "forward", 0.089),
        (SsdProblem("B8_T4096_H16_P128_S128_G16"), "forward", 0.178),
        (AttentionProblem("B8_T4096_H16_D128", 1.0), "forward", 0.760),
        (AttentionProblem("B8_T4096_H16_D128", 1.0), "forward_backward", 2.660),
        (AttentionProblem("B8_T4096_H16_D128", 0.5), "forward", 0.380),
        (AttentionProblem("B8_T4096_H16_D128", 0.5), "forward_backward", 1.330),
        (AttentionProblem("B1_T32768_H16_D128", 1.0), "forward", 6.081),
        (AttentionProblem("B1_T32768_H16_D128", 1.0), "forward_backward", 21.283),
        (RoutingProblem("route_pack", "B8_T4096_H16_D128", 0.25), "forward", 0.045),
    ],
)
def test_floors_at_the_measured_rates_of_an_h100(
    problem: Problem, mode: str, milliseconds: float
) -> None:
    """Gates, scores and states add 3 % at most to what was counted there: q, k, v and o."""
    floor = floor_of(problem, mode, torch.bfloat16, H100)
    assert milliseconds * 0.98 <= floor.milliseconds <= milliseconds * 1.04


def test_floor_of_a_backward_by_bytes() -> None:
    """Forward reads 8 units and writes 2; backward reads 8 and 2 and writes 8."""
    problem = RuleProblem("B8_T4096_H16_D128")
    forward, output = problem.cost(torch.bfloat16).bytes, problem.output_bytes(torch.bfloat16)
    floor = floor_of(problem, "forward_backward", torch.bfloat16, H100)
    assert floor.bound == "bytes"
    expected = (forward + (forward - output) + output + (forward - output)) / 3021e9 * 1e3
    assert floor.milliseconds == pytest.approx(expected)


def test_float32_products_have_no_ceiling() -> None:
    floor = floor_of(AttentionProblem("B1_T4096_H1_D16", 1.0), "forward", torch.float32, H100)
    assert floor.bound == "bytes"


def test_inputs_are_the_same_every_time_and_of_the_right_dtype() -> None:
    for problem in (RULE, SsdProblem("B1_T9_H2_P4_S3_G2"), AttentionProblem("B1_T9_H2_D4", 0.5)):
        first, second = (problem.inputs(torch.bfloat16, CPU, 7) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert next(iter(first.values())).dtype == torch.bfloat16
    assert RULE.inputs(torch.bfloat16, CPU, 7)["beta_BTH"].dtype == torch.float32


@pytest.mark.parametrize("operation", ["gated_delta_rule", "ssd", "routed_attention"])
@pytest.mark.parametrize("elements", [1, 130 * 16 * 2, 1 << 26])
def test_truth_is_the_reference_however_it_is_sliced(
    operation: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truth, "SLICE_ELEMENTS", elements)
    monkeypatch.setattr(truth, "QUERY_BLOCK", 64)
    assert check_truth(operation, CPU) is None


def test_truth_that_is_off_is_found() -> None:
    def off(problem: Problem, inputs: dict, weight: torch.Tensor) -> Truth:
        made = compute_truth(problem, inputs, weight)
        made.gradients["d k"] = made.gradients["d k"] * (1 + 1e-6)
        return made

    assert "1.0e-06 in d k" in check_truth("gated_delta_rule", CPU, off)


def test_shared_key_heads_in_the_truth_of_attention() -> None:
    problem = AttentionProblem("B1_T40_H4_D8_G2", 0.4)
    inputs = problem.inputs(torch.float64, CPU, 0)
    weight = weight_for(problem, inputs)
    assert weight.shape == (1, 40, 4, 8)
    made = compute_truth(problem, inputs, weight)
    q, k, v, routed_BT = inputs.values()
    repeated = {
        "q_BTHK": q,
        "k_BTHK": k.repeat_interleave(2, 2),
        "v_BTHV": v.repeat_interleave(2, 2),
        "routed_BT": routed_BT,
    }
    whole = compute_truth(problem, repeated, weight)
    torch.testing.assert_close(made.outputs["o"], whole.outputs["o"])
    summed = whole.gradients["d k"].unflatten(2, (2, 2)).sum(3)
    torch.testing.assert_close(made.gradients["d k"], summed)


def test_who_is_timed() -> None:
    rule, quarter = RULE, AttentionProblem("B1_T9_H2_D4", 0.25)
    dense = AttentionProblem("B1_T9_H2_D4", 1.0)
    assert "reference" not in default_names(rule) and "reference" in provider_names(rule)
    assert set(default_names(dense)) == {"sdpa_cudnn", "sdpa_flash"}
    assert {"torch", "flex", PREPACKED, "flex_masked"} <= set(default_names(quarter))
    assert not {"sdpa_cudnn", "sdpa_flash"} & set(default_names(quarter))
    assert choose_names(rule, ["fla", "flex"]) == ("fla",)
    assert choose_names(rule, ["reference"]) == ("reference",)
    check_names(["fla", PREPACKED, "argsort"])
    with pytest.raises(ConfigError, match="unknown provider 'auto'"):
        check_names(["auto"])


def test_our_rule_is_timed_with_its_score_and_peers_without() -> None:
    assert make_subject(RULE, "torch").labels == {"score": "cosine"}
    outputs = make_subject(RULE, "torch").call(RULE.inputs(torch.float32, CPU, 0))
    assert list(outputs) == ["o", "final_state", "score"]
    assert make_subject(RULE, "fla").labels["score"] == "none"


def test_inputs_get_the_names_of_the_public_function() -> None:
    problem = SsdProblem("B1_T9_H2_P4_S3_G2")
    named = named_arguments(problem, problem.inputs(torch.float32, CPU, 0))
    assert list(named)[:3] == ["x_BTHP", "dt_BTH", "a_H"] and len(named) == 6


def test_reasons_to_leave_a_subject_out() -> None:
    inputs = RULE.inputs(torch.float32, CPU, 0)
    assert "not available" in refusal(make_subject(RULE, "fla"), RULE, inputs)
    assert refusal(make_subject(RULE, "torch"), RULE, inputs) is None
    part = RoutingProblem("route_index", "B2_T9_H1_D4", 0.5)
    found = refusal(make_subject(part, "triton"), part, part.inputs(torch.float32, CPU, 0))
    assert "not available" in found


@pytest.mark.parametrize("operation", ["route_index", "route_pack"])
def test_parts_of_routing_agree(operation: str) -> None:
    problem = RoutingProblem(operation, "B3_T70_H2_D4", 0.3)
    inputs = problem.inputs(torch.float32, CPU, 0)
    inputs["routed_BT"][0] = False
    made = [make_subject(problem, name).call(inputs) for name in ("torch", "argsort")]
    assert routing_parts.mismatch(made[1], made[0]) is None
    positions = made[0]["position"][1, : int(made[0]["count"][1])].tolist()
    assert positions == inputs["routed_BT"][1].nonzero().flatten().tolist()
    made[1]["position"][1, 0] += 1
    assert routing_parts.mismatch(made[1], made[0]) == "position differs in slots in use"
    made[1]["count"] = made[1]["count"] + 1
    assert routing_parts.mismatch(made[1], made[0]) == "counts differ"


def test_targets_name_what_is_timed() -> None:
    assert PREPACKED_TARGET == PREPACKED
    for target in TARGETS:
        if not target.measured_here:
            continue
        found = {
            (one.fraction, name)
            for one in make_problems(target.operation, target.shape)
            for name in default_names(one)
        }
        assert one_of(found, target.fraction)
        if target.peer is not None:
            peer_fraction = target.peer_fraction or target.fraction
            assert (peer_fraction, target.peer) in found, target


def one_of(found: set, fraction: float | None) -> bool:
    return any(part == fraction for part, _ in found)
