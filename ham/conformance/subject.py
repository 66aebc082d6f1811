"""The small model on which the rules look at a mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ham.model.calibration import calibrate
from ham.model.decoder import DecoderLM
from ham.model.mixer import RoutingHints, SequenceMixer
from ham.model.model_config import ModelConfig
from ham.model.registry import mixer_class

VOCABULARY = 257


def small_model(
    mixer: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    **options: Any,
) -> DecoderLM:
    """A small `DecoderLM` around a registered mixer; same seed, same weights.

    Sets torch's global seed. An untrained model's routers get the thresholds of their targets on
    random tokens.

    Args:
        mixer: Registered name.
        seed: Seed of the weights.
        dtype: Of the weights.
        layers: Number of layers.
        options: Options of the mixer, over its `small_options`.

    Raises:
        ConfigError: For an unknown mixer or options it refuses.
    """
    torch.manual_seed(seed)
    model = DecoderLM(
        ModelConfig(
            arm=mixer.replace("_", "-"),
            mixer=mixer,
            options={**mixer_class(mixer).small_options, **options},
            vocabulary_size=VOCABULARY,
            layers=layers,
            width=32,
            heads=2,
            mlp_width=64,
            max_positions=1024,
            context=128,
            tokenizer="byte",
        )
    )
    if model.routes:
        set_thresholds(model)
    return model.to(dtype).eval()


def set_thresholds(model: DecoderLM, fraction: float | None = None) -> None:
    """Freeze the routers at `fraction`, or at their own targets, on random tokens."""
    calibrate(model, [random_tokens(4, 128, seed=1, ids=256)], fraction)


def random_tokens(batch: int, length: int, seed: int = 3, ids: int = VOCABULARY) -> Tensor:
    """`tokens_BT` on the CPU, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, ids, (batch, length), generator=generator)


@dataclass(frozen=True)
class Subject:
    """A registered mixer on a device.

    Attributes:
        name: Registered name.
        device: Where the rules run.
        full: Let torch.compile build machine code on a CPU too, which takes a minute a mixer.
    """

    name: str
    device: str = "cpu"
    full: bool = False

    @property
    def mixer(self) -> type[SequenceMixer]:
        """Its class."""
        return mixer_class(self.name)

    @property
    def compiler(self) -> str:
        """Backend of torch.compile: all of it, or its tracing and its derivatives alone."""
        whole = self.full or torch.device(self.device).type != "cpu"
        return "inductor" if whole else "aot_eager"

    @property
    def exact(self) -> float:
        """How far apart two runs may be that do the same arithmetic in the same order.

        On other devices than the CPU libraries may choose the order by the shape.
        """
        return 0.0 if torch.device(self.device).type == "cpu" else 1e-9

    def model(
        self,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        fraction: float | None = None,
        layers: int = 2,
    ) -> DecoderLM:
        """A new small model in evaluation mode, routing `fraction` (its own target when None)."""
        model = small_model(self.name, seed, dtype, layers)
        if fraction is not None and model.routes:
            set_thresholds(model, fraction)
        return model.to(self.device)

    def tokens(self, batch: int, length: int, seed: int = 3) -> Tensor:
        """`tokens_BT`."""
        return random_tokens(batch, length, seed).to(self.device)

    def vectors(self, batch: int, length: int, dtype: torch.dtype, seed: int = 3) -> Tensor:
        """Standard normal `x_BTD` for a mixer used without its decoder."""
        generator = torch.Generator().manual_seed(seed)
        x_BTD = torch.randn(batch, length, 32, generator=generator, dtype=torch.float64)
        return x_BTD.to(self.device, dtype)

    def told(self, batch: int, length: int, first: int = 0, end: int | None = None) -> dict:
        """The keyword arguments that the mixer takes beside vectors, for a slice of the tokens."""
        if not self.mixer.uses_hints:
            return {}
        return {"hints": RoutingHints(self.tokens(batch, length)[:, first:end])}
