"""The router of a layer: every score in parallel, in pieces and step by step; hints; bad scores."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ham.errors import ConfigError, NotFiniteError, RoutingError
from ham.files import read_json, write_json
from ham.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_scored
from ham.layer import HamMixer, HamOptions
from ham.model.calibration import calibrate
from ham.model.checkpoint import load_model, save_model
from ham.model.decoder import DecoderLM
from ham.model.generation import generate
from ham.model.mixer import MixerShape, RoutingHints
from ham.model.model_config import ModelConfig
from ham.model.registry import parse_options
from ham.routing import follow, head_scores, post_update_from_l2
from ham.routing.controls import RANDOM_STREAM, hash_uniform
from ham.routing.router import Router
from ham.routing.threshold import ThresholdController

KINDS = {
    "cosine": {},
    "post_update": {"score": "post_update"},
    "learned": {"score": "learned"},
    "random": {"score": "random", "routing_seed": 3},
    "periodic": {"score": "periodic"},
    "prefix": {"score": "prefix"},
    "lexical": {"score": "lexical"},
    "oracle": {"score": "oracle"},
    "cosine-per-head": {"reduction": "per_head"},
    "post_update-per-head": {"score": "post_update", "reduction": "per_head"},
    "random-per-head": {"score": "random", "reduction": "per_head"},
}


def build(seed: int = 0, trained_with: int = 0, **options) -> DecoderLM:
    torch.manual_seed(seed)
    described = ModelConfig(
        arm="ham",
        seed=trained_with,
        mixer="ham",
        options={"target": 0.3, **options},
        vocabulary_size=257,
        layers=2,
        width=32,
        heads=2,
        mlp_width=64,
        max_positions=512,
        context=128,
    )
    model = DecoderLM(described).double().eval()
    model.set_unigram_counts(torch.arange(257) ** 2)
    return model


def tokens_and_wanted(
    batch: int = 2, length: int = 90, seed: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, 257, (batch, length), generator=generator)
    return tokens_BT, torch.rand(batch, length, generator=generator) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_every_score_routes_alike_in_parallel_in_pieces_and_step_by_step(kind) -> None:
    model = build(**KINDS[kind])
    tokens_BT, wanted_BT = tokens_and_wanted()
    # Other tokens, or the threshold would be a score of this text and rounding could cross it.
    calibrate(model, [RoutingHints(*tokens_and_wanted(seed=5))])
    expected = model(tokens_BT, wanted_BT)
    assert 0.2 < expected.kv_fraction() < 0.4

    state, pieces = model.init_state(2), []
    for part in range(0, 60, 17):
        cut = slice(part, min(part + 17, 60))
        pieces.append(model.prefill(tokens_BT[:, cut], state, wanted_BT[:, cut]))
    for layer, aux in enumerate(expected.aux):
        kept = torch.cat([piece.aux[layer].kept_share_BT() for piece in pieces], dim=1)
        assert torch.equal(kept, aux.kept_share_BT()[:, :60])
    stepped = [
        model.step(tokens_B, state, wanted_B)
        for tokens_B, wanted_B in zip(
            tokens_BT[:, 60:].unbind(1), wanted_BT[:, 60:].unbind(1), strict=True
        )
    ]
    logits = torch.cat([*(piece.logits_BTV for piece in pieces), torch.stack(stepped, 1)], dim=1)
    torch.testing.assert_close(logits, expected.logits_BTV, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_post_update_from_the_l2_score_is_that_of_the_reference(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 70, 3, 16, generator=generator, dtype=dtype) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    v[0, 5] = 0
    log_decay = -torch.rand(2, 70, 3, generator=generator, dtype=dtype)
    beta = torch.rand(2, 70, 3, generator=generator, dtype=dtype)
    prediction = gated_delta_rule(q, k, v, log_decay, beta, provider="reference").prediction_BTHV
    expected = head_scores("post_update", prediction, v, beta)
    # What is still wrong after the write, in the words of the definition (unit keys).
    after = prediction + beta[..., None] * (v - prediction)
    torch.testing.assert_close(expected, (v - after).norm(dim=-1), rtol=1e-5, atol=1e-6)
    l2_BTH = gated_delta_rule_scored(q, k, v, log_decay, beta, score="l2").score_BTH
    found = post_update_from_l2(l2_BTH, v, beta)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


def test_per_head_decisions_are_those_of_each_heads_score() -> None:
    model = build(reduction="per_head", target=0.4)
    tokens_BT, _ = tokens_and_wanted()
    calibrate(model, [tokens_BT])
    aux = model(tokens_BT).aux[0]
    threshold = model.controllers[0].threshold
    assert aux.routed_BT is None and aux.routed_BTH.shape == (2, 90, 2)
    assert torch.equal(aux.routed_BTH, aux.score_BTH >= threshold)
    assert not torch.equal(aux.routed_BTH[..., 0], aux.routed_BTH[..., 1])
    assert abs(float(aux.routed_BTH.double().mean()) - 0.4) < 0.01
    assert torch.equal(aux.kept_share_BT(), aux.routed_BTH.float().mean(-1))


def test_random_decisions_depend_on_seed_layer_and_position_alone() -> None:
    tokens_BT, _ = tokens_and_wanted()
    one, same, other = (
        build(seed=w, score="random", routing_seed=s) for w, s in ((0, 1), (9, 1), (0, 2))
    )
    scores = [[aux.score_BT for aux in model(tokens_BT).aux] for model in (one, same, other)]
    assert torch.equal(scores[0][0], scores[1][0]) and torch.equal(scores[0][1], scores[1][1])
    assert not torch.equal(scores[0][0], scores[2][0])
    assert not torch.equal(scores[0][0], scores[0][1])
    assert torch.equal(scores[0][0][0], scores[0][0][1])


@pytest.mark.parametrize("score", ["random", "lexical", "oracle"])
def test_hashes_follow_the_seed_of_the_training_unless_an_option_names_one(score) -> None:
    tokens_BT, wanted_BT = tokens_and_wanted()

    def scores(trained_with: int, **options) -> torch.Tensor:
        model = build(trained_with=trained_with, score=score, **options)
        return model(tokens_BT, wanted_BT).aux[1].score_BT

    own, explicit = scores(5), scores(5, routing_seed=2)
    assert torch.equal(own, scores(0, routing_seed=5))
    assert torch.equal(explicit, scores(9, routing_seed=2))
    assert torch.equal(scores(5, routing_seed=0), scores(0))
    assert not torch.equal(own, scores(6)) and not torch.equal(own, explicit)


def test_a_stored_model_without_a_seed_routes_by_the_hash_of_before(tmp_path) -> None:
    """Checkpoints from before the seed was stored: every training routed by seed 0."""
    tokens_BT, _ = tokens_and_wanted()
    model = build(score="random")
    calibrate(model, [tokens_BT])
    save_model(tmp_path, model)
    description = read_json(tmp_path / "model.json")
    assert description["config"].pop("seed") == 0
    write_json(tmp_path / "model.json", description)
    loaded = load_model(tmp_path).double()
    expected_T = hash_uniform((RANDOM_STREAM, 0, 1), torch.arange(90))
    assert torch.equal(loaded(tokens_BT).aux[1].score_BT[0], expected_T)
    assert torch.equal(loaded(tokens_BT).aux[1].routed_BT, model(tokens_BT).aux[1].routed_BT)


def test_loading_and_decoding_keep_the_hash_of_the_training(tmp_path) -> None:
    tokens_BT, _ = tokens_and_wanted(batch=1)
    model = build(trained_with=7, score="random")
    calibrate(model, [tokens_BT])
    save_model(tmp_path, model)
    loaded = load_model(tmp_path).double()
    assert loaded.config.seed == 7
    whole = model(tokens_BT)
    assert torch.equal(loaded(tokens_BT).aux[0].routed_BT, whole.aux[0].routed_BT)
    state = loaded.init_state(1, torch.float64)
    logits = [loaded.step(token_B, state) for token_B in tokens_BT.unbind(1)]
    torch.testing.assert_close(torch.stack(logits, 1), whole.logits_BTV)
    other = build(trained_with=8, score="random")
    calibrate(other, [tokens_BT])
    assert not torch.equal(other(tokens_BT).aux[0].routed_BT, whole.aux[0].routed_BT)


def test_prefix_keeps_as_many_first_tokens_of_every_text() -> None:
    model = build(score="prefix")
    calibrate(model, [tokens_and_wanted()[0]])
    for length in (90, 180):
        routed_BT = model(tokens_and_wanted(length=length)[0]).aux[0].routed_BT
        assert torch.equal(routed_BT, (torch.arange(length) < 27).expand(2, -1)), "0.3 of 90"


def test_the_oracle_keeps_wanted_tokens_first() -> None:
    model = build(score="oracle", control="fixed", threshold=1.0)
    tokens_BT, wanted_BT = tokens_and_wanted()
    for aux in model(tokens_BT, wanted_BT).aux:
        assert torch.equal(aux.routed_BT, wanted_BT)
    with pytest.raises(RoutingError, match="wanted_BT"):
        model(tokens_BT)


def test_lexical_scores_are_the_surprise_of_the_token() -> None:
    model = build(score="lexical")
    tokens_BT, _ = tokens_and_wanted()
    counts = torch.arange(257) ** 2 + 1.0
    surprise = -(counts / counts.sum()).log()
    for aux in model(tokens_BT).aux:
        torch.testing.assert_close(
            aux.score_BT.double(), surprise[tokens_BT].double(), rtol=0, atol=2e-3
        )
    with pytest.raises(ValueError, match="257"):
        model.set_unigram_counts(torch.ones(3))


def test_a_lexical_router_without_counts_is_an_error_not_a_choice() -> None:
    model = build(score="lexical")
    for table in model._unigram_tables():
        table.surprise_V.fill_(torch.nan)
    model(tokens_and_wanted()[0])
    with pytest.raises(RoutingError, match=r"180 in layer 0 \(score lexical\), 180 in layer 1"):
        model.check_scores()


def test_the_learned_router_gets_the_gradient_of_its_routed_values() -> None:
    model = build(score="learned", target=0.5, exploration=0.0).train()
    tokens_BT, _ = tokens_and_wanted()
    calibrate(model, [tokens_BT])
    loss, output = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    loss.backward()
    router = model.blocks[1].mixer.router
    for parameter in router.learned.parameters():
        assert parameter.grad.abs().max() > 0
    # The factor v (1 + s - stop(s)) leaves outputs as they are: the gradient of s is that of a
    # factor on the values of that token. By differences of sums in float64.
    mixer = model.blocks[1].mixer
    token = int(output.aux[1].routed_BT[0].nonzero()[3])
    attend, grads = mixer.store.attend, []

    def scaled(q, k, v, score, routed, graded, by=0.0):
        factor = torch.ones(v.shape[:2], dtype=v.dtype)
        factor[0, token] += by
        graded = graded.detach().requires_grad_()
        grads.append(graded)
        return attend(q, k, v * factor[..., None, None], score, routed, graded)

    sums = {}
    for by in (0.0, 1e-5, -1e-5):
        mixer.store.attend = lambda *arguments, by=by: scaled(*arguments, by=by)
        sums[by] = model(tokens_BT[:, :-1]).logits_BTV.square().sum()
    sums[0.0].backward()
    expected = float((sums[1e-5] - sums[-1e-5]).detach()) / 2e-5
    assert abs(expected) > 1e-6
    assert float(grads[0].grad[0, token]) == pytest.approx(expected, rel=1e-4)


def test_exploration_routes_other_tokens_each_step_and_ends_with_the_freeze() -> None:
    model = build(score="learned", target=0.25, exploration=0.5).train()
    tokens_BT, _ = tokens_and_wanted(batch=4, length=128)
    masks = []
    for _ in range(3):
        aux = model(tokens_BT).aux[0]
        below = aux.score_BT < model.controllers[0].threshold
        masks.append(aux.routed_BT & below)
        sums = model.controllers[0].step_sums_4
        assert float(sums[1]) == float(aux.routed_BT.sum())  # counted in the fraction
        assert 0.4 < float(masks[-1].sum() / below.sum()) < 0.6
        model.end_step()
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0][0], masks[0][1])
    calibrate(model, [tokens_BT])
    aux = model(tokens_BT).aux[0]
    assert torch.equal(aux.routed_BT, aux.score_BT >= model.controllers[0].threshold)
    model.eval()
    assert abs(model(tokens_BT).kv_fraction() - 0.25) < 0.01


class NoSync(TorchDispatchMode):
    """Fails where a result would have to come from the device to the host."""

    FORBIDDEN = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not function.name().startswith(self.FORBIDDEN), function.name()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_of_the_router_never_waits_for_the_device(kind) -> None:
    options = HamOptions(**{"target": 0.3, "scope": "global", **KINDS[kind]})
    router = Router(MixerShape(32, 2, vocabulary_size=257), options).train()
    tokens_BT, wanted_BT = tokens_and_wanted()
    x_BTD = torch.randn(2, 90, 32)
    state_BTH = torch.rand(2, 90, 2) if router.kernel_score else None
    hints = RoutingHints(tokens_BT, wanted_BT)
    router(x_BTD, state_BTH, 0, hints)  # the quantile start looks once
    with NoSync():
        router(x_BTD, state_BTH, 0, hints)
        router(x_BTD, state_BTH, torch.tensor([3, 8]), hints)
        follow([router.controller])


@pytest.mark.parametrize("reduction", ["min", "mean", "max", "per_head"])
def test_scores_that_are_not_finite_are_errors_everywhere(reduction) -> None:
    model = build(reduction=reduction)
    tokens_BT, _ = tokens_and_wanted()
    calibrate(model, [tokens_BT])
    with torch.no_grad():  # head 1 of layer 1 only
        model.blocks[1].mixer.gates.projection.weight[3] = torch.nan
        model.blocks[1].mixer.qkv.weight[80] = torch.nan
    model(tokens_BT)
    with pytest.raises(RoutingError, match=r"layer 1 \(score cosine\)") as caught:
        model.check_scores()
    assert "180 in layer 1" in str(caught.value) and "layer 0" not in str(caught.value)
    model.check_scores()  # told once
    with pytest.raises(NotFiniteError, match="prompt 0: a routing score of layer 1 is NaN"):
        generate(model, [[1, 2, 3]], 2)
    with pytest.raises(RoutingError, match="layer 1"):
        calibrate(model, [tokens_BT])


def test_casting_a_model_to_sixteen_bits_leaves_its_thresholds() -> None:
    controller = ThresholdController(0.3)
    controller.calibrate(torch.rand(1000, generator=torch.Generator().manual_seed(0)), 0.3)
    before = controller.threshold.clone()
    controller.to(torch.bfloat16)
    assert controller.threshold.dtype == torch.float32
    assert torch.equal(controller.threshold, before)
    assert controller.double().threshold.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "surprise"}, "cosine"),
        ({"score": "recency"}, "budget 'bounded' only"),
        ({"score": "learned", "reduction": "per_head"}, "differs between heads"),
        ({"control": "fixed"}, "threshold must be given exactly when control is 'fixed'"),
        ({"threshold": 0.5}, "threshold must be given exactly when control is 'fixed'"),
        ({"control": "fixed", "threshold": float("nan")}, "threshold must be finite"),
        ({"exploration": 1.5}, "legal: 0..1"),
        ({"scope": "model"}, "layer"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_message(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options("ham", options, 128)


def test_a_lexical_layer_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocabulary_size 0"):
        HamMixer(MixerShape(32, 2), HamOptions(score="lexical"))


def test_a_score_of_tokens_needs_the_tokens() -> None:
    layer = HamMixer(MixerShape(32, 2, vocabulary_size=9), HamOptions(score="lexical"))
    with pytest.raises(RoutingError, match="needs hints"):
        layer(torch.zeros(1, 4, 32))
