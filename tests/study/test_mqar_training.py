"""Training and evaluation of the study: it learns, and a step is fit for a CUDA graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import mean

import pytest
import torch

from ham.model.mixer import MixerAux
from ham.study.config import MqarConfig, Size
from ham.study.data import STALE, Examples
from ham.study.evaluation import Tally, _held_pairs, evaluate_size, held_out, kept_at_the_end
from ham.study.model import RecallModel
from ham.study.program import JointData, Program
from ham.study.training import Trainer, TrainingData, rate_at

CPU = torch.device("cpu")
HOLA = {"budget": "bounded", "slots": 6, "score": "committed", "reduction": "per_head"}
ARMS = {
    name: {"name": name, "mixer": mixer, "options": options}
    for name, mixer, options in (
        ("transformer", "transformer", {}),
        ("gated-delta-rule", "gated_delta_rule", {}),
        ("sliding-window", "sliding_window", {"window": 8}),
        ("ham-committed", "ham", {"score": "committed"}),
        ("ham-learned", "ham", {"score": "learned", "sink": "zero"}),
        ("ham-oracle", "ham", {"score": "oracle"}),
        ("ham-random", "ham", {"score": "random"}),
        ("ham-prefix", "ham", {"score": "prefix"}),
        ("hola", "ham", HOLA),
        ("delta-rule-window", "gated_delta_rule_window", {"window": 8}),
    )
}
GPU_KERNELS = dict.fromkeys(("ham", "gated_delta_rule", "gated_delta_rule_window"), "triton")
# What a host would wait for; `tolist` on a CPU is seen by fake tensors only.
REFUSE = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = (aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal)

class Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in WAITING, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))
"""


def make_trainer(config: MqarConfig, kernels: str = "auto") -> Trainer:
    torch.manual_seed(0)
    task = config.tasks[0]
    model = RecallModel(config, config.arms[0], task, config.widths[0], kernels)
    data = TrainingData(config, task, config.seeds[0], config.train.steps, CPU)
    return Trainer(model, data, config.train, config.learning_rates[0])


def make_program(config: MqarConfig, kernels: str = "auto") -> Program:
    """The same run twice, at two rates."""
    trainers = [make_trainer(config, kernels) for _ in range(2)]
    data = JointData([trainers[0].data])
    models = [trainer.model for trainer in trainers]
    return Program(models, data, [0, 0], config.train, [0.01, 0.02])


def train(trainer: Trainer) -> list[float]:
    for _ in range(trainer.settings.steps):
        trainer.advance()
    return trainer.losses()


def test_it_learns_to_recall(tiny_study):
    config = tiny_study(
        train={
            "steps": 60,
            "batch_size": 32,
            "mixture": [{"length": 64, "pairs": 4, "weight": 2}, {"length": 64, "pairs": 8}],
        },
        evaluate={"examples": 100, "batch_size": 50, "sizes": [{"length": 64, "pairs": 4}]},
    )
    trainer = make_trainer(config)
    trainer.start()
    losses = train(trainer)
    assert mean(losses[-6:]) < 0.8 * mean(losses[:6])
    size = config.evaluate.sizes[0]
    result = evaluate_size(trainer.model, held_out(config, size, config.tasks[0], CPU), size, 50)
    assert result.all.accuracy > 3 / 31, "no better than three times a guess among the values"


@pytest.mark.parametrize("arm", ARMS)
def test_the_warm_up_before_a_capture_leaves_no_trace(tiny_study, arm: str):
    losses = []
    for warm in (False, True):
        trainer = make_trainer(tiny_study(arms=[ARMS[arm]]))
        trainer.start()
        if warm:
            trainer.warm_up()
        losses.append(train(trainer))
    assert losses[0] == losses[1]


def test_recorded_steps_are_replayed_in_the_order_of_the_schedule(
    tiny_study, monkeypatch: pytest.MonkeyPatch
):
    """Everything of a capture but the recording itself, which needs a GPU."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(Trainer, "_record", lambda self, work, pool: work)
    eager, replayed = make_trainer(tiny_study()), make_trainer(tiny_study())
    eager.start()
    replayed.start()
    replayed._capture()
    assert train(replayed) == train(eager)
    for mine, other in zip(replayed.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_thresholds_start_at_their_target_follow_and_freeze(tiny_study):
    config = tiny_study(train={"steps": 20, "freeze_fraction": 0.6})
    trainer = make_trainer(config)
    trainer.start()
    controllers = [block.mixer.controller for block in trainer.model.blocks]
    seen = [[float(controller.threshold) for controller in controllers]]
    for _ in range(20):
        trainer.advance()
        seen.append([float(controller.threshold) for controller in controllers])
    moved = [step for step in range(1, 21) if seen[step] != seen[step - 1]]
    # Once in each cycle of three steps, and at the calibration after step 12.
    assert moved == [3, 6, 9, 12]
    assert all(bool(controller.frozen) for controller in controllers)


# One process for all, as it takes seconds to start. Prints what each step raised, by case.
CHECK = """
import json
from contextlib import nullcontext

from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import TINY
from ham.study.config import parse_mqar_config
from test_mqar_training import ARMS, GPU_KERNELS, make_program, make_trainer

def waits(arm, kernels, mode, make=make_trainer):
    train = {"steps": 2, "batch_size": 1, "mixture": [{"length": 16, "pairs": 2}]}
    config = parse_mqar_config({**TINY, "train": train, "arms": [ARMS[arm]]}, source="test")
    steps = make(config, kernels)
    for model in steps.models:
        model.train()
        for controller in model.controllers:
            controller.freeze(0.5, 0.25)
    try:
        with mode:
            steps.step(0)
            if steps.models[0].controllers:
                steps.end_cycle()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no"

found = {}
for arm in ARMS:
    kernels = GPU_KERNELS.get(ARMS[arm]["mixer"], "auto")
    for kind, make in (("alone", make_trainer), ("together", make_program)):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        found[f"{arm} {kind}"] = waits(arm, kernels, mode, make)
found["computed"] = waits("ham-committed", "triton", Refuse())
for_cpu = FakeTensorMode(allow_non_fake_inputs=True)
found["packing for a CPU"] = waits("ham-committed", "torch", for_cpu)
print(json.dumps(found))
"""


def test_no_step_waits_for_the_device():
    """Traced on tensors without values, with the operators of a GPU; one arm is also computed.

    The provider of a CPU asks the device for its longest row, which the check must find.
    """
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r})\n{REFUSE}{CHECK}"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found.pop("packing for a CPU").startswith("DataDependentOutputException")
    assert set(found.values()) == {"no"}, found
    assert len(found) == 2 * len(ARMS) + 1


def test_a_diverged_run_says_at_which_step(tiny_study):
    trainer = make_trainer(tiny_study(train={"freeze_fraction": 1.0}))
    trainer.start()
    trainer.advance()
    with torch.no_grad():
        trainer.model.embedding.weight.fill_(float("nan"))
    trainer.advance()
    with pytest.raises(ArithmeticError, match="the loss is nan at step 2"):
        trainer.losses()


def test_learning_rates_rise_and_fall_to_zero(tiny_study):
    settings = tiny_study(train={"steps": 100, "warmup_fraction": 0.1}).train
    rates = [rate_at(step, settings, 1.0) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001


class Parrot(torch.nn.Module):
    """Answers every query with value 40 and routes as told for the row that the token 0 names."""

    device = CPU

    def __init__(self, routed_BT: torch.Tensor):
        super().__init__()
        self.routed_BT = routed_BT
        self.blocks = []
        self.slots = [None, None]

    def forward(self, examples: Examples):
        logits_BPC = torch.zeros(*examples.queries_NP.shape, 64)
        logits_BPC[..., 40] = 1
        routed_BT = self.routed_BT[examples.tokens_NT[:, 0]]
        return logits_BPC, [MixerAux(routed_BT=routed_BT), MixerAux()]


def test_accuracy_and_routing_are_counted_by_hand():
    # key stale key value key value filler query query, the first key twice; then the same with the
    # last pair a copy of the one before and nothing overwritten.
    classes = torch.tensor([[1, 5, 1, 2, 1, 2, 0, 3, 3], [1, 2, 1, 2, 1, 4, 0, 3, 3]]).char()
    examples = Examples(
        torch.tensor([[0] * 9, [1] * 9]),
        classes,
        queries_NP=torch.tensor([[7, 8], [7, 8]]),
        answers_NP=torch.tensor([[41, 40], [42, 40]]),
        stale_NP=torch.tensor([[40, -1], [-1, -1]]),
        places_NPC=torch.tensor([[[5, 5], [3, 3]], [[1, 1], [3, 5]]]),
    )
    routed = torch.tensor([[0, 1, 0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1, 1, 0, 1]]).bool()
    size = Size(length=12, pairs=2)
    for batch in (1, 2):
        result = evaluate_size(Parrot(routed), examples, size, batch)
        # The parrot says 40: stale, right, wrong, right.
        assert (result.once, result.updated) == (Tally(3, 2, 0), Tally(1, 0, 1))
        assert result.all == Tally(4, 2, 1)
        assert result.class_tokens == [2, 6, 4, 4, 1, 1]
        assert result.routed == {0: [1, 2, 1, 1, 1, 1]}
        assert result.kv_fraction == result.fraction(0) == 7 / 18
        # Pair 2 of both: at its value in the first, at its copy in the second.
        assert result.held == {0: 2}
        assert result.recall(0) == 0.5
        assert result.precision(0) == 2 / 7
        assert result.kept(0, STALE) == 1.0


def test_a_cache_of_every_head_counts_by_the_share_that_holds_a_pair():
    places_BPC = torch.tensor([[[0, 2], [1, 3]]])
    kept_BTG = torch.tensor([[[1, 0], [0, 0], [1, 1], [0, 0]]]).bool()
    # Pair 1 in both heads (in one of them twice), pair 2 in none.
    assert _held_pairs(kept_BTG, places_BPC) == 1.0
    assert _held_pairs(kept_BTG[..., 1:], places_BPC) == 1.0
    assert _held_pairs(kept_BTG[:, [0, 1, 0, 1]], places_BPC) == 0.5


def test_a_cache_of_fixed_size_holds_what_a_decoder_holds_in_the_end(tiny_study):
    config = tiny_study(arms=[ARMS["hola"]])
    torch.manual_seed(0)
    model = RecallModel(config, config.arms[0], config.tasks[0], 32).eval()
    size = Size(length=32, pairs=4)
    examples = held_out(config, size, config.tasks[0], CPU)
    with torch.no_grad():
        aux = model(examples)[1][0]
        x_BTD = model.blocks[0].mixer_norm(model.embedding(examples.tokens_NT))
        state = model.blocks[0].mixer.init_state(len(x_BTD), CPU, torch.float32)
        model.blocks[0].mixer.prefill(x_BTD, state)
    kept_BTG = kept_at_the_end(aux, model.slots[0])
    assert torch.equal(kept_BTG.sum(1), torch.full((10, 2), 6)), "6 slots in each of 2 heads"
    assert aux.routed_BTH.sum() > kept_BTG.sum(), "some were evicted"
    positions = state.cache.held.position_BGS.sort(dim=-1).values.flatten()
    expected = kept_BTG.mT.nonzero()[:, 2]
    assert torch.equal(positions, expected)
    assert evaluate_size(model, examples, size, 10).kv_fraction == 6 / 32
    assert kept_at_the_end(MixerAux(), None) is None


@pytest.mark.parametrize(
    ("arm", "fraction"),
    [("transformer", 1.0), ("gated-delta-rule", None), ("sliding-window", 0.5)],
)
def test_a_model_that_does_not_route_declares_its_cache(tiny_study, arm, fraction):
    config = tiny_study(arms=[ARMS[arm]])
    model = RecallModel(config, config.arms[0], config.tasks[0], 32)
    size = Size(length=16, pairs=2)
    result = evaluate_size(model, held_out(config, size, config.tasks[0], CPU), size, 5)
    assert result.kv_fraction == fraction
