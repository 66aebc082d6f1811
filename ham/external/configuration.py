"""From an arm's `external` section to a model: sizes, the MLP that matches parameters, new weights.

Sizes that the arm does not give come from the `model` section wherever the configuration class has
a key for them. Where it has the key `intermediate_size`, the width of the MLP is searched so that
parameters, counted on the real module, agree with the reference within 1 %; elsewhere the model
is left unmatched and says so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ham.config import ArmConfig, Config
from ham.errors import ConfigError, UnusableModelError
from ham.external.library import (
    check_keys,
    configuration_class,
    legal_keys,
    make_configuration,
    one_line,
    quiet,
)
from ham.model.sizing import MLP_MULTIPLE, TOLERANCE, plain_mlp_width

MLP_KEY = "intermediate_size"
_HEAD_KEYS = ("num_attention_heads", "num_heads")


@dataclass(frozen=True)
class ExternalModelConfig:
    """What is needed to build a model of another library; stored beside its weights.

    Attributes:
        arm: Name of the arm in the comparison.
        library: `transformers` or `fla`.
        model_type: What the library calls it.
        vocabulary_size: Number of logits.
        max_positions: Longest sequence the model may read.
        context: Training context.
        tokenizer: Name of the tokenizer.
        values: Arguments of its configuration class; empty where it was read from a folder.
        matched: Whether its parameters agree with those of the reference within 1 %; None where
            there is no reference.
    """

    arm: str
    library: str
    model_type: str
    vocabulary_size: int
    max_positions: int
    context: int
    tokenizer: str
    values: dict[str, Any] = field(default_factory=dict)
    matched: bool | None = None

    @property
    def mixer(self) -> str:
        """`LIBRARY:MODEL_TYPE`."""
        return f"{self.library}:{self.model_type}"

    @property
    def mlp_width(self) -> int:
        """Width of the MLP; 0 where the configuration has no such key."""
        return self.values.get(MLP_KEY) or 0

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return dataclasses.asdict(self)

    def build(self) -> nn.Module:
        """An `ExternalLM` with new weights, drawn from torch's random numbers.

        Raises:
            ConfigError: If the library refuses the configuration.
            UnusableModelError: If the library is not there.
        """
        from ham.external.model import ExternalLM

        return ExternalLM(self, self.build_network())

    def build_network(self) -> nn.Module:
        """The library's own module; as `build`."""
        configuration = make_configuration(
            configuration_class(self.library, self.model_type), self.model_type, self.values
        )
        return network_of(configuration, self.model_type)


def network_of(configuration: Any, model_type: str) -> nn.Module:
    """The causal language model of a configuration object, with new weights in float32.

    Raises:
        ConfigError: If the library refuses it.
        UnusableModelError: If it needs a package that is not there.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            return AutoModelForCausalLM.from_config(configuration, dtype=torch.float32)
    except ImportError as error:
        raise UnusableModelError(
            f"a {model_type!r} model needs a package: {one_line(error)}"
        ) from error
    except Exception as error:  # layers check their sizes in their own ways
        raise ConfigError(
            f"a {model_type!r} model cannot be built from its configuration "
            f"({type(error).__name__}: {one_line(error)}); give other values under `config`"
        ) from error


def check_external(arm: ArmConfig) -> None:
    """Check the model type and the keys of an arm.

    Raises:
        UnusableModelError: If the library is not there.
        ConfigError: For an unknown model type or key.
    """
    external = arm.external
    configuration = configuration_class(external.library, external.model_type)
    check_keys(configuration, external.model_type, external.config)


def external_config(config: Config, arm: ArmConfig, vocabulary_size: int) -> ExternalModelConfig:
    """The model of an external arm with the usual MLP width.

    Args:
        config: The experiment.
        arm: An arm with an `external` section.
        vocabulary_size: Of the experiment's tokenizer.

    Raises:
        UnusableModelError: If the library is not there.
        ConfigError: For an unknown model type or key, or values that the library refuses.
    """
    check_external(arm)
    return ExternalModelConfig(
        arm=arm.name,
        library=arm.external.library,
        model_type=arm.external.model_type,
        vocabulary_size=vocabulary_size,
        max_positions=config.model.max_positions,
        context=config.data.context,
        tokenizer=config.data.tokenizer,
        values=_values(config, arm, vocabulary_size),
    )


def matched_config(plain: ExternalModelConfig, arm: ArmConfig, target: int) -> ExternalModelConfig:
    """The same with the MLP that brings it to `target` parameters, where there is such a one.

    Raises:
        UnusableModelError, ConfigError: As `external_config`.
    """
    if MLP_KEY in plain.values and MLP_KEY not in arm.external.config:
        found = _search(plain, target)
        if _matches(found, target):
            return dataclasses.replace(found, matched=True)
    return dataclasses.replace(plain, matched=_matches(plain, target))


def parameters_of(described: ExternalModelConfig) -> int:
    """Parameters of the real module, built without memory."""
    with torch.device("meta"):
        return described.build().count_parameters()


def _matches(described: ExternalModelConfig, target: int) -> bool:
    return abs(parameters_of(described) - target) <= TOLERANCE * target


def _search(plain: ExternalModelConfig, target: int) -> ExternalModelConfig:
    """The MLP width whose parameters are nearest to `target`; parameters are linear in it."""
    width = plain.mlp_width
    count = parameters_of(plain)
    per_step = parameters_of(_with_mlp(plain, width + MLP_MULTIPLE)) - count
    steps = round((target - count) / per_step) if per_step > 0 else 0
    return _with_mlp(plain, max(MLP_MULTIPLE, width + steps * MLP_MULTIPLE))


def _with_mlp(described: ExternalModelConfig, width: int) -> ExternalModelConfig:
    return dataclasses.replace(described, values={**described.values, MLP_KEY: width})


def _values(config: Config, arm: ArmConfig, vocabulary_size: int) -> dict[str, Any]:
    """Arguments of the configuration class, under its own names."""
    external = arm.external
    configuration = configuration_class(external.library, external.model_type)
    legal, own_name = legal_keys(configuration), dict(configuration.attribute_map)
    given = {own_name.get(key, key): value for key, value in external.config.items()}
    values = {
        "vocab_size": vocabulary_size,
        "hidden_size": config.model.width,
        "num_hidden_layers": config.model.layers,
        "max_position_embeddings": config.model.max_positions,
        MLP_KEY: plain_mlp_width(config.model.width),
        **dict.fromkeys(_HEAD_KEYS, config.model.heads),
        # Those of the library's own vocabulary mean other tokens here.
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }
    values = {own_name.get(key, key): value for key, value in values.items() if key in legal}
    values |= given
    names = {key: own_name.get(key, key) for key in ("hidden_size", *_HEAD_KEYS)}
    heads = next((values[names[key]] for key in _HEAD_KEYS if names[key] in values), None)
    width = values.get(names["hidden_size"])
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        # A library's default head size belongs to its default width.
        inner = width * _expansion(configuration, given)
        for key, value in (("num_key_value_heads", heads), ("head_dim", inner // heads)):
            if key in legal:
                values.setdefault(key, value)
    return values


def _expansion(configuration: type, given: dict[str, Any]) -> int:
    """Inner width over width where heads divide an expanded width, as in Mamba-2."""
    if "expand" not in legal_keys(configuration):
        return 1
    default = make_configuration(configuration, configuration.model_type, {}).expand
    value = given.get("expand", default)
    if int(value) != value:
        raise ConfigError(f"expand {value}; legal: a whole number")
    return int(value)
