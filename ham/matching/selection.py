"""Which arm the others are matched to, which others, and at which lengths."""

from __future__ import annotations

from collections.abc import Sequence

from ham.config import ArmConfig, Config
from ham.errors import ConfigError, unknown_choice
from ham.model.registry import mixer_class, registered_mixers


def reference_arm(config: Config) -> str:
    """The first arm that keeps a share of the tokens.

    Raises:
        ConfigError: If none does, or a mixer is unknown.
    """
    for arm in config.arms:
        if arm.mixer and any(knob.share for knob in mixer_class(arm.mixer).memory_knobs):
            return arm.name
    raise ConfigError(
        f"no arm of {config.name!r} keeps a share of the tokens; name the arm to match with --arm: "
        f"{', '.join(arm.name for arm in config.arms)}"
    )


def choose_rivals(
    config: Config, reference: str, names: Sequence[str] | None = None, registered: bool = False
) -> list[ArmConfig]:
    """The arms to match, in the order of the configuration.

    Args:
        config: The experiment.
        reference: Name of the arm that they are matched to; never among them.
        names: Arms of the configuration or registered baselines; every other arm when None.
        registered: Also every registered baseline that no arm uses, with its own defaults.

    Raises:
        ConfigError: For a name that is neither; or if no rival is left.
    """
    arms = {arm.name: arm for arm in config.arms}
    known = {arm.name: arm for arm in map(_defaults, registered_mixers())}
    chosen = [arm for arm in config.arms if names is None or arm.name in names]
    for name in names or []:
        arm = known.get(name.replace("_", "-"))
        if name in arms or arm in chosen:
            continue
        if arm is None:
            raise unknown_choice("arm or baseline", name, [*arms, *registered_mixers()])
        chosen.append(arm)
    if registered:
        used = {mixer for arm in config.arms for mixer in arm.mixers}
        chosen += [arm for arm in known.values() if arm.mixer not in used and arm not in chosen]
    rivals = [arm for arm in chosen if arm.name != reference]
    if not rivals:
        raise ConfigError(
            f"nothing to match to {reference!r}: {config.name!r} has no other arm; add some, name "
            "registered baselines with --arms, or give --registered"
        )
    return rivals


def evaluated_lengths(config: Config) -> list[int]:
    """The lengths in tokens at which a model of this configuration is evaluated, sorted."""
    evaluate = config.evaluate
    lengths = {config.data.context}
    if evaluate.language_modelling:
        lengths.update(evaluate.language_modelling.contexts)
    if evaluate.needle:
        lengths.update(evaluate.needle.lengths)
    return sorted(lengths)


def check_lengths(config: Config, lengths: Sequence[int]) -> list[int]:
    """`lengths` sorted and without repetition.

    Raises:
        ConfigError: If a model may not read so many tokens.
    """
    limit = config.model.max_positions
    outside = [length for length in lengths if not 1 <= length <= limit]
    if outside:
        raise ConfigError(
            f"a context of {outside[0]} tokens cannot be matched; legal: 1..{limit} "
            "(model.max_positions)"
        )
    return sorted(set(lengths))


def _defaults(mixer: str) -> ArmConfig:
    return ArmConfig(name=mixer.replace("_", "-"), mixer=mixer)
