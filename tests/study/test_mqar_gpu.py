"""Training under CUDA graphs against the same training without them, and together against alone."""

from __future__ import annotations

import pytest
import torch

from ham.study.config import Task
from ham.study.model import RecallModel
from ham.study.program import JointData, Program
from ham.study.training import Steps, Trainer, TrainingData

pytestmark = pytest.mark.gpu
STEPS = 12


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("transformer", {}),
        ("sliding_window", {"window": 16}),
        ("gated_delta_rule", {}),
        ("ham", {"score": "cosine", "sink": "zero"}),
        ("ham", {"score": "committed"}),
        ("ham", {"score": "learned"}),
        ("ham", {"score": "oracle"}),
        ("ham", {"score": "prefix"}),
        ("ham", {"budget": "bounded", "slots": 8, "score": "committed", "reduction": "per_head"}),
        ("gated_delta_rule_window", {"window": 16}),
    ],
)
def test_graphs_train_like_eager_steps(tiny_study, gpu, mixer: str, options: dict, precision: str):
    config = tiny_study(
        arms=[{"name": "arm", "mixer": mixer, "options": options}],
        train={"steps": STEPS, "batch_size": 8, "precision": precision},
    )
    task = Task(filler="random")
    data = TrainingData(config, task, 0, STEPS, gpu)
    losses, thresholds = [], []
    for captured in (True, False):
        torch.manual_seed(0)
        model = RecallModel(config, config.arms[0], task, 32).to(gpu)
        trainer = Trainer(model, data, config.train, 0.003, graphs=captured)
        trainer.start()
        for _ in range(STEPS):
            trainer.advance()
        losses.append(torch.tensor(trainer.losses()))
        thresholds.append([float(controller.threshold) for controller in model.controllers])
    # Atomic additions and, in bfloat16, other matrix kernels make small differences.
    tolerance = 2e-3 if precision == "float32" else 2e-2
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=0)
    # NaN where a store decides without a threshold.
    expected = pytest.approx(thresholds[1], rel=10 * tolerance, abs=0.01, nan_ok=True)
    assert thresholds[0] == expected


def test_runs_side_by_side_do_not_disturb_each_other(tiny_study, gpu):
    config = tiny_study(train={"steps": STEPS, "batch_size": 8})
    task = config.tasks[0]
    data = TrainingData(config, task, 0, STEPS, gpu)

    def trainers(count: int) -> list[Trainer]:
        made = []
        for seed in range(count):
            torch.manual_seed(seed)
            model = RecallModel(config, config.arms[0], task, 32).to(gpu)
            made.append(Trainer(model, data, config.train, 0.003))
            made[-1].start()
        for _ in range(STEPS):
            for trainer in made:
                trainer.advance()
        return made

    together = [trainer.losses() for trainer in trainers(4)]
    (alone,) = (trainer.losses() for trainer in trainers(1))
    assert together[0] == pytest.approx(alone, rel=2e-3)
    assert len({tuple(losses) for losses in together}) == 4


def start_off_the_calibration(steps: Steps) -> None:
    """Thresholds start at a score of the calibration; where that comes again, rounding decides."""
    steps.start()
    for model in steps.models:
        for controller in model.controllers:
            controller.threshold.mul_(0.999)
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("transformer", {"short_conv": 4}),
        ("sliding_window", {"window": 16}),
        ("gated_delta_rule", {}),
        ("ham", {"score": "committed", "sink": "zero"}),
        ("ham", {"score": "cosine", "sink": "learned"}),
        ("ham", {"score": "learned", "sink": "zero"}),
        ("ham", {"score": "random", "sink": "zero"}),
        ("ham", {"budget": "bounded", "slots": 8, "score": "committed", "reduction": "per_head"}),
        ("gated_delta_rule_window", {"window": 16}),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_runs_in_one_program_train_like_runs_alone(
    tiny_study, gpu, mixer: str, options: dict, precision: str
):
    config = tiny_study(
        arms=[{"name": "arm", "mixer": mixer, "options": options}],
        train={"steps": STEPS, "batch_size": 8, "precision": precision},
    )
    task = Task(filler="random")
    parts = [TrainingData(config, task, seed, STEPS, gpu) for seed in range(3)]
    rates = [0.003, 0.001, 0.002]

    def model(seed: int) -> RecallModel:
        torch.manual_seed(seed)
        return RecallModel(config, config.arms[0], task, 32).to(gpu)

    models = [model(seed) for seed in range(3)]
    together = Program(models, JointData(parts), [0, 1, 2], config.train, rates)
    start_off_the_calibration(together)
    for _ in range(STEPS):
        together.advance()
    tolerance = 2e-3 if precision == "float32" else 2e-2
    for run, (part, rate) in enumerate(zip(parts, rates, strict=True)):
        alone = Trainer(model(run), part, config.train, rate)
        start_off_the_calibration(alone)
        for _ in range(STEPS):
            alone.advance()
        assert together.losses_of(run) == pytest.approx(alone.losses(), rel=tolerance)
        thresholds = [float(one.threshold) for one in alone.model.controllers]
        mine = [float(one.threshold) for one in together.models[run].controllers]
        assert mine == pytest.approx(thresholds, rel=10 * tolerance, abs=0.01, nan_ok=True)
