"""Every policy against its definition, token by token, and against the rules of every mixer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from ham.baselines.transformer import Transformer, TransformerOptions
from ham.baselines.transformer_evicted import TransformerEvicted, TransformerEvictedOptions
from ham.conformance import RULES, Subject
from ham.conformance.subject import small_model
from ham.eviction.options import EvictionConfig
from ham.eviction.policies import make_policy
from ham.eviction.schedule import Schedule
from ham.model.mixer import MixerShape
from ham.routing.controls import EVICTION_STREAM, hash_uniform

SNAPKV = {"policy": "snapkv", "interval": 8, "observation": 5, "kernel": 3}
CASES: dict[str, dict[str, Any]] = {
    "random": {"policy": "random", "fraction": 0.3, "interval": 6, "seed": 4},
    "streaming": {"policy": "streaming", "tokens": 9, "interval": 4, "sinks": 2},
    "streaming at once": {"policy": "streaming", "tokens": 9, "interval": 1, "sinks": 2},
    "norm": {"policy": "norm", "fraction": 0.35, "interval": 5},
    "snapkv": {**SNAPKV, "fraction": 0.4},
    "snapkv, fixed": {**SNAPKV, "tokens": 11},
    "wide pool": {**SNAPKV, "fraction": 0.6, "observation": 2, "kernel": 9},
}
SHAPE = MixerShape(width=32, heads=4, layer=1, layers=2, max_positions=128)
TIME = 61
RULES_OF_MEMORY = [
    *("finite", "unwritten", "causality", "pieces", "steps", "reorder", "gradcheck"),
    *("join", "join_pieces", "join_again", "join_equal", "bytes_held", "flops"),
]


def mixer(eviction: dict[str, Any], **options: Any) -> TransformerEvicted:
    torch.manual_seed(0)
    parsed = TransformerEvictedOptions.model_validate({"eviction": eviction, **options})
    return TransformerEvicted(SHAPE, parsed).double().eval()


def inputs(batch: int = 2) -> Tensor:
    return torch.randn(batch, TIME, 32, generator=torch.Generator().manual_seed(1)).double()


def priorities(eviction: dict, head: int, held: list[int], q_THK, k_TGK) -> dict[int, float]:
    """The priority of each held token once all tokens of `q_THK` were read."""
    read, policy = len(q_THK), eviction["policy"]
    if policy == "random":
        key = (EVICTION_STREAM, eviction["seed"], SHAPE.layer)
        return {j: float(hash_uniform(key, torch.tensor(j))) for j in held}
    if policy == "streaming":
        return {j: math.inf if j < eviction["sinks"] else j for j in held}
    if policy == "norm":
        return {j: -float(k_TGK[j, head].norm()) for j in held}
    first, sharing = read - eviction["observation"], q_THK.shape[1] // k_TGK.shape[1]
    mass = dict.fromkeys((j for j in held if j < first), 0.0)
    for query in range(first, read):
        seen = [j for j in held if j <= query]
        for q_K in q_THK[query, head * sharing : (head + 1) * sharing]:
            weights = (k_TGK[seen, head] @ q_K / math.sqrt(len(q_K))).softmax(0).tolist()
            for j, weight in zip(seen, weights, strict=True):
                if j in mass:
                    mass[j] += weight
    reach = eviction["kernel"] // 2
    pooled = {j: max(mass[i] for i in mass if abs(i - j) <= reach) for j in mass}
    return {j: pooled.get(j, math.inf) for j in held}


def plain(layer: TransformerEvicted, eviction: dict, x_TD: Tensor) -> tuple[Tensor, list[list]]:
    """Outputs of one sequence and what each head of keys holds at its end, by the definition."""
    q_THK, k_TGK, v_TGV = (part[0] for part in layer._project(x_TD[None], 0)[:3])
    heads, sharing = k_TGK.shape[1], q_THK.shape[1] // k_TGK.shape[1]
    least = max(1, eviction.get("sinks", 0), eviction.get("observation", 0))
    held: list[list[int]] = [[] for _ in range(heads)]
    outputs = []
    for t in range(len(x_TD)):
        read, o_HV = t + 1, []
        for head in range(heads):
            held[head].append(t)
            for q_K in q_THK[t, head * sharing : (head + 1) * sharing]:
                logits = k_TGK[held[head], head] @ q_K / math.sqrt(len(q_K))
                o_HV.append(logits.softmax(0) @ v_TGV[held[head], head])
            if read % eviction["interval"] == 0:
                share = eviction.get("fraction")
                budget = eviction["tokens"] if share is None else max(least, int(share * read))
                value = priorities(eviction, head, held[head], q_THK[:read], k_TGK)
                held[head] = sorted(sorted(held[head], key=lambda j: (-value[j], j))[:budget])
        outputs.append(torch.cat(o_HV))
    return layer.out(torch.stack(outputs)), held


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "short_conv": 3}], ids=["plain", "shared"])
@pytest.mark.parametrize("case", CASES)
def test_a_policy_is_its_definition(case: str, options: dict) -> None:
    layer, x_BTD = mixer(CASES[case], **options), inputs()
    y_BTD, _ = layer(x_BTD)
    state = layer.init_state(2, x_BTD.device, torch.float64)
    prefilled_BTD, _ = layer.prefill(x_BTD, state)
    for row in range(2):
        expected_TD, held = plain(layer, CASES[case], x_BTD[row])
        torch.testing.assert_close(y_BTD[row], expected_TD, rtol=0, atol=1e-12)
        torch.testing.assert_close(prefilled_BTD[row], expected_TD, rtol=0, atol=1e-12)
        count = state.cache.filled.longest
        found_CN = state.cache.slots.position_BNC[row, :count].T.tolist()
        assert found_CN == held[: len(found_CN)] and count == len(held[0])
        assert len(found_CN) == (
            layer.kv_heads if CASES[case]["policy"] in ("norm", "snapkv") else 1
        )


@dataclass(frozen=True)
class WithPolicy(Subject):
    """The mixer with another policy than that of its `small_options`."""

    eviction: dict[str, Any] = field(default_factory=dict)

    def model(self, dtype=torch.float64, seed=0, fraction=None):
        return small_model(self.name, seed, dtype, eviction=self.eviction)


@pytest.mark.parametrize("rule", RULES_OF_MEMORY)
@pytest.mark.parametrize("case", ["random", "streaming", "streaming at once", "norm", "wide pool"])
def test_every_policy_keeps_the_rules_of_a_mixer(case: str, rule: str) -> None:
    subject = WithPolicy("transformer_evicted", eviction=CASES[case])
    finding = RULES[rule].judge(subject)
    assert finding.passed is True, finding.message


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_full_budget_is_the_transformer(case: str) -> None:
    whole = {key: value for key, value in CASES[case].items() if key != "tokens"}
    layer, x_BTD = mixer({**whole, "fraction": 1.0}), inputs()
    transformer = Transformer(SHAPE, TransformerOptions()).double().eval()
    transformer.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x_BTD)[0], transformer(x_BTD)[0], rtol=0, atol=1e-13)
    assert layer.held_share(TIME) == transformer.held_share(TIME) == 1.0
    assert layer.state_bytes(TIME).kv == transformer.state_bytes(TIME).kv
    # The policy would change it.
    assert not torch.allclose(mixer(CASES[case])(x_BTD)[0], transformer(x_BTD)[0])


@torch.no_grad()
def test_skipped_layers_keep_everything() -> None:
    full = mixer({"policy": "norm", "fraction": 0.2, "skip_layers": 2})
    assert full.held_share(60) == 1.0
    assert mixer({"policy": "norm", "fraction": 0.2, "skip_layers": 1}).held_share(60) < 0.5


@torch.no_grad()
def test_later_tokens_and_padding_change_nothing_before_them() -> None:
    x_BTD = inputs()
    for case in CASES:
        layer = mixer(CASES[case])
        short_BTD, _ = layer(x_BTD[:, :37])
        torch.testing.assert_close(layer(x_BTD)[0][:, :37], short_BTD, rtol=0, atol=1e-13)


def test_the_random_policy_differs_between_layers_and_seeds_alone() -> None:
    position_N = torch.arange(200)
    draws = {
        (seed, layer): hash_uniform((EVICTION_STREAM, seed, layer), position_N)
        for seed in (0, 1)
        for layer in (0, 1)
    }
    for key, values in draws.items():
        assert all(key == other or not torch.equal(values, draws[other]) for other in draws)


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.29, 1.0, None])
@pytest.mark.parametrize(("interval", "least"), [(1, 1), (7, 5), (16, 16)])
def test_a_schedule_counts_what_a_loop_counts(fraction, interval: int, least: int) -> None:
    schedule = Schedule(interval, fraction, 20 if fraction is None else None, least)
    held = pairs = last = slots = 0
    for read in range(1, 300):
        assert schedule.until_eviction(read - 1) == interval - (read - 1) % interval
        assert schedule.slots(read - 1) == slots + interval
        held += 1
        pairs += held
        last += held if (read - 1) % interval >= interval - min(3, interval) else 0
        if read % interval == 0:
            exact = 20 if fraction is None else max(least, math.floor(round(fraction * read, 9)))
            held = slots = min(held, exact)
        assert schedule.held(read) == held
        assert schedule.pairs(read) == pairs
        assert schedule.pairs(read, min(3, interval)) == last


def test_random_eviction_follows_the_seed_of_the_training_unless_it_names_one() -> None:
    def seed(trained_with: int, **options: int) -> int:
        config = EvictionConfig(policy="random", fraction=0.3, **options)
        return make_policy(config, layer=0, heads=1, seed=trained_with).seed

    assert (seed(3), seed(3, seed=0), seed(3, seed=5)) == (3, 0, 5)
