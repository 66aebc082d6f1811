"""This project's models for lm-eval 0.4.13, registered there under the name `ham`.

lm-eval has no entry points for models: whoever wants `--model ham` must import this module first,
which `ham lm-eval` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

# lm-eval declares its own models only while its registry is empty, so before ours.
import lm_eval.models  # noqa: F401
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from ham.errors import ConfigError
from ham.evaluate.continuations import overflows, score_continuations
from ham.evaluate.scoring import OnBatch, RoutingCount
from ham.model.generation import generate
from ham.model.precision import precision_context

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from ham.model.language_model import LanguageModel
    from ham.train.tokenizer import Tokenizer

DEFAULT_BATCH_SIZE = 16
DEFAULT_NEW_TOKENS = 256


@dataclass
class TaskRecord:
    """What happened while one task was answered.

    Attributes:
        truncated: Requests whose context was cut from the left to fit.
        routing: Tokens read and routed.
        scored_tokens: Tokens scored by the request's arguments: those of the continuation of a
            `(context, continuation)`, all of a `(text,)`.
    """

    truncated: int = 0
    routing: RoutingCount = field(default_factory=RoutingCount)
    scored_tokens: dict[tuple[str, ...], int] = field(default_factory=dict)


@register_model("ham")
class HamLM(TemplateLM):
    """An lm-eval model around a `LanguageModel`.

    Args:
        pretrained: Checkpoint folder, or a model (then `tokenizer` is needed).
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        batch_size: Rows of `max_length` tokens per forward pass.
        max_batch_size: Accepted because lm-eval passes it; not used.
        max_length: Longest input in tokens; the training context when missing.
        tokenizer: The tokenizer of a model that is given as an object.
        precision: `auto` (bfloat16 autocast on a GPU), `float32` or `bfloat16`.
        share_contexts: Whether the options of a question read their context once.
        on_batch: Called after each forward pass with the rows done and the rows in all, and when
            generation ends with the prompts done and the prompts in all.

    Raises:
        MissingDataError, CorruptFileError: For a checkpoint that cannot be read.
        ConfigError: For a length beyond the position range.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        tokenizer: Tokenizer | None = None,
        precision: str = "auto",
        share_contexts: bool = True,
        on_batch: OnBatch | None = None,
    ):
        super().__init__()
        if isinstance(pretrained, str):
            pretrained, tokenizer = load_checkpoint(pretrained, device)
        elif tokenizer is None:
            raise ValueError("a model given as an object needs its tokenizer")
        self.model = pretrained.eval()
        self.precision = precision
        self.share_contexts = share_contexts
        self.on_batch = on_batch
        self._tokens = tokenizer
        self._device = pretrained.device
        size = str(batch_size or DEFAULT_BATCH_SIZE)
        self.batch_size = int(size) if size.isdigit() else DEFAULT_BATCH_SIZE
        self.max_length = int(max_length or pretrained.config.context)
        if self.max_length > pretrained.config.max_positions:
            raise ConfigError(
                f"max_length {self.max_length} is beyond the model's max_positions "
                f"{pretrained.config.max_positions}"
            )
        self.records: dict[str, TaskRecord] = {}
        self._record = TaskRecord()

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> HamLM:
        """From lm-eval's command line; `--model_args` counts before `--device` and its like."""
        others = {key: value for key, value in (additional_config or {}).items() if value}
        return cls(**{**others, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> HamLM:
        """The same from one `key=value,key=value` string."""
        return cls.create_from_arg_obj(
            utils.simple_parse_args_string(arg_string), additional_config
        )

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which also stands in for an empty context."""
        return self._tokens.end_of_text

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's request cache."""
        return self._tokens.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text; special tokens are never added."""
        return self._tokens.encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation and whether it is the greedy one."""
        return self._by_task(
            requests, lambda group: super(HamLM, self).loglikelihood(group, disable_tqdm=True)
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows that predict every token once."""
        return self._by_task(requests, self._rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations, each cut before the first of its stop strings.

        Raises:
            ConfigError: For sampling, which this model does not do, or when the new tokens
                leave no room for a context.
        """
        return self._by_task(requests, self._generate)

    def _by_task(
        self, requests: Sequence[Instance], answer: Callable[[list[Instance]], list[Any]]
    ) -> list[Any]:
        """Answer task by task, so that counts belong to one task each."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.task_name or "", []).append(index)
        results: list[Any] = [None] * len(requests)
        for task, indices in groups.items():
            self._record = self.records.setdefault(task, TaskRecord())
            with precision_context(self.model.device, self.precision):
                answers = answer([requests[index] for index in indices])
            for index, result in zip(indices, answers, strict=True):
                results[index] = result
        return results

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = True,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        for texts, context, continuation in requests:
            self._record.scored_tokens[texts] = len(continuation)
            self._record.truncated += overflows(context, continuation, self.max_length)
        pairs = [(context, continuation) for _, context, continuation in requests]
        results = self._score(pairs)
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        return score_continuations(
            self.model,
            pairs,
            self.batch_size,
            self.max_length,
            self._record.routing,
            self.on_batch,
            self.share_contexts,
        )

    def _rolling(self, requests: list[Instance]) -> list[float]:
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            self._record.scored_tokens[request.args] = len(tokens)
            rolling = utils.get_rolling_token_windows(
                token_list=tokens,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, rolling):
                windows.append((list(context), list(continuation)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._score(windows), strict=True):
            totals[owner] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _generate(self, requests: list[Instance]) -> list[str]:
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(generation_settings(request.args[1]), []).append(index)
        results = [""] * len(requests)
        for (new_tokens, until), indices in groups.items():
            room = self.max_length - new_tokens
            if room < 1:
                raise ConfigError(
                    f"max_gen_toks {new_tokens} leaves no room for a context within max_length "
                    f"{self.max_length}; give --gen_kwargs max_gen_toks=N or a longer max_length"
                )
            prompts = [self._prompt(requests[index].args[0], room) for index in indices]
            stop = self._stop_rule(until) if until else self._ended
            answers = generate(
                self.model, prompts, new_tokens, stop, self.batch_size, on_finished=self.on_batch
            )
            for index, tokens in zip(indices, answers, strict=True):
                results[index] = cut_before(self._text(tokens), until)
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, result)
        return results

    def _prompt(self, context: str, room: int) -> list[int]:
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        self._record.truncated += len(tokens) > room
        return tokens[-room:]

    def _ended(self, tokens: list[int]) -> bool:
        return tokens[-1] == self.eot_token_id

    def _stop_rule(self, until: tuple[str, ...]) -> Callable[[list[int]], bool]:
        # A token stands for at least one byte, so a stop string that the newest token completes
        # lies within that many tokens, and one more in case it starts inside a token.
        reach = max(len(text.encode()) for text in until) + 1

        def stop(tokens: list[int]) -> bool:
            tail = self._tokens.decode(tokens[-reach:])
            return self._ended(tokens) or any(text in tail for text in until)

        return stop

    def _text(self, tokens: list[int]) -> str:
        if tokens and self._ended(tokens):
            tokens = tokens[:-1]
        return self._tokens.decode(tokens)


def load_checkpoint(folder: str, device: str | None) -> tuple[LanguageModel, Tokenizer]:
    """Model and tokenizer of a checkpoint folder.

    Raises:
        MissingDataError, CorruptFileError: If the checkpoint cannot be read.
        ConfigError, DeviceError: For a device that is unknown or not here.
    """
    from pathlib import Path

    from ham.device import resolve_device
    from ham.model.checkpoint import load_model
    from ham.train.tokenizer import load_tokenizer

    kind, _, index = (device or "auto").partition(":")
    resolved = str(resolve_device(kind))
    model = load_model(folder, f"{resolved}:{index}" if index else resolved)
    return model, load_tokenizer(model.config.tokenizer, Path(folder))


def generation_settings(arguments: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """`(new tokens, stop strings)` of a request's generation arguments.

    Raises:
        ConfigError: If they ask for sampling.
    """
    if arguments.get("do_sample") or float(arguments.get("temperature") or 0) > 0:
        raise ConfigError(
            f"this model generates greedily only; received {arguments!r}; "
            "legal: do_sample=False and temperature=0"
        )
    until = arguments.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    stops = tuple(text for text in until if text)
    return int(arguments.get("max_gen_toks") or DEFAULT_NEW_TOKENS), stops


def cut_before(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first occurrence of any stop string."""
    for stop in stops:
        text = text.split(stop)[0]
    return text
