"""What the arms of an experiment cost: built without memory, asked by their mixers' methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ham.config import ArmConfig, Config
from ham.device import uses_gpu
from ham.errors import ConfigError, HamError
from ham.matching.search import Refusal
from ham.measure.cost import TRAINING_PASSES
from ham.model.decoder import DecoderLM
from ham.model.knob import Knob
from ham.model.mixer import MixerOptions, SequenceMixer
from ham.model.precision import is_reduced
from ham.model.registry import mixer_class, parse_options
from ham.model.sizing import Sizing, plain_model, sized
from ham.plan import Plan

T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """An arm that could be built.

    Attributes:
        model: On the meta device, with the usual MLP width: that changes no decoding memory.
        sizing: The MLP for the reference's parameters.
    """

    model: DecoderLM
    sizing: Sizing


class Bench:
    """The reference arm and everything that is measured against it.

    Args:
        config: The experiment.
        reference: Name of the arm that the others are matched to.
        fraction: Share of the tokens read that the reference keeps; its own target when None.

    Attributes:
        reference: The reference arm, with that share.
        element_size: Bytes of a key's or a value's element, by the precision of the configuration.

    Raises:
        ConfigError: If there is no such arm, it cannot be built, or no share can be set.
    """

    def __init__(self, config: Config, reference: str, fraction: float | None = None):
        self.config = config
        self.vocabulary_size = Plan(config, cores=1).vocabulary_size
        device = "cuda" if uses_gpu(config.device) else "cpu"
        self.element_size = 2 if is_reduced(device, config.train.precision) else 4
        self.reference = config.arm(reference)
        if fraction is not None:
            self.reference = self._keeping(self.reference, fraction)
        self._known: dict[str, Measured | Refusal] = {}
        self._target: int | None = None
        measured = self.measure(self.reference)
        if isinstance(measured, Refusal):
            raise ConfigError(f"arm {reference!r} cannot be matched to: {measured.reason}")

    def measure(self, arm: ArmConfig) -> Measured | Refusal:
        """Build an arm, or say why it cannot be; its parameters may not match."""
        key = arm.model_dump_json(exclude={"name", "steps"})
        if key not in self._known:
            self._known[key] = or_refusal(lambda: self._build(arm))
        return self._known[key]

    def state_bytes(self, arm: ArmConfig, context: int) -> float | Refusal:
        """Allocated bytes of one sequence's decoding memory after `context` tokens.

        Refused too where no MLP brings the arm to the reference's parameters.
        """
        return or_refusal(lambda: self._state_bytes(self._sized(arm), context))

    def training_flops(self, arm: ArmConfig) -> float | Refusal:
        """FLOPs of the arm's training, at the reference's parameters; validation is left out."""
        return or_refusal(lambda: self._training_flops(arm))

    def options(self, arm: ArmConfig) -> MixerOptions:
        """The options of the arm's mixer.

        Raises:
            ConfigError: If the mixer is unknown or refuses them.
        """
        return parse_options(arm.mixer, arm.options, self.config.data.context)

    def knobs(self, arm: ArmConfig) -> list[Knob]:
        """The knobs that the arm's mixer declares and its options let count.

        Raises:
            ConfigError: As `options`; or if a knob is no option of the mixer.
        """
        mixer, options = mixer_class(arm.mixer), self.options(arm)
        for knob in mixer.memory_knobs:
            _check_knob(mixer, knob)
        return [knob for knob in mixer.memory_knobs if knob.applies(options)]

    def _build(self, arm: ArmConfig) -> Measured:
        if not arm.mixer:
            raise ConfigError(f"it is {arm.architecture!r}; arms with a mixer can be sized")
        plain = plain_model(self.config, arm, self.vocabulary_size)
        with torch.device("meta"):
            model = DecoderLM(plain)
        _check_shares(model)
        count = model.count_parameters()
        if self._target is None:
            # The first arm built is the reference.
            self._target = count
        return Measured(model, sized(plain, count, self._target))

    def _sized(self, arm: ArmConfig) -> Measured:
        measured = self.measure(arm)
        if isinstance(measured, Refusal):
            raise ConfigError(measured.reason)
        if measured.sizing.fault:
            raise ConfigError(measured.sizing.fault)
        return measured

    def _state_bytes(self, measured: Measured, context: int) -> int:
        model = measured.model
        return model.state_bytes(context, model.target_fraction, self.element_size).allocated

    def _training_flops(self, arm: ArmConfig) -> float:
        with torch.device("meta"):
            model = DecoderLM(self._sized(arm).sizing.model)
        train = self.config.training(arm)
        forward = model.forward_flops(self.config.data.context, model.target_fraction)
        return TRAINING_PASSES * forward * train.batch_size * train.steps

    def _keeping(self, arm: ArmConfig, fraction: float) -> ArmConfig:
        shares = [knob.option for knob in self.knobs(arm) if knob.share]
        if not shares:
            raise ConfigError(
                f"arm {arm.name!r} ({arm.mixer}) has no share of tokens to set; leave the fraction "
                "out to match what it holds as configured"
            )
        return changed(arm, {shares[0]: fraction})


def or_refusal(compute: Callable[[], T]) -> T | Refusal:
    """What `compute` returns, or why an arm cannot be built or asked."""
    try:
        return compute()
    except HamError as error:
        return Refusal(str(error))
    except Exception as error:  # a mixer from outside may raise anything; the others go on
        return Refusal(f"{type(error).__name__}: {error}")


def changed(arm: ArmConfig, options: dict[str, Any], **values: Any) -> ArmConfig:
    """`arm` with other options, and with other fields given by keyword."""
    fields = arm.model_dump(mode="json", exclude_unset=True)
    if options:
        fields["options"] = {**arm.options, **options}
    return ArmConfig.model_validate({**fields, **values})


def _check_knob(mixer: type[SequenceMixer], knob: Knob) -> None:
    known = mixer.Options.model_fields
    unknown = {knob.option, *knob.where} - set(known)
    if unknown:
        raise ConfigError(
            f"mixer {mixer.registered_name!r} declares a knob on {', '.join(sorted(unknown))}, "
            f"which is no option of it; known: {', '.join(sorted(known)) or 'none'}"
        )


def _check_shares(model: DecoderLM) -> None:
    """Refuse a model whose routed share only training tells."""
    if any(controller.control == "fixed" for controller in model.controllers):
        raise ConfigError(
            "routes by a fixed threshold; what it keeps is known only once it is trained"
        )
