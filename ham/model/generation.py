"""Generation by prefill and step, with the real decoding memory of each architecture.

Prompts of one length are prefilled together and without padding, so that padding never reaches a
recurrent state. Their memories are then joined into one batch whose sequences stand at different
positions, and every step advances all of them. Finished sequences leave; when half of the batch is
free, waiting prompts join.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ham.decoding.stepper import Stepper, make_stepper
from ham.errors import ConfigError, NotFiniteError
from ham.model.decoder import DecoderOutput
from ham.model.language_model import LanguageModel, Memory
from ham.model.sampling import Sampling
from ham.paging.budget import CacheBudget, told_when_out_of_memory

StopRule = Callable[[list[int]], bool]
OnFinished = Callable[[int, int], None]

DEFAULT_BATCH_SIZE = 16
_NOT_FINITE = -1


@dataclass
class GenerationFacts:
    """What a generation took; filled in while it runs.

    Attributes:
        new_tokens: Tokens made, of all prompts.
        first_token_seconds: Time from the call to the first token.
        seconds: Time from the call to the newest token.
        memory_bytes: Largest allocated decoding memory, of all sequences of the batch.
        read_tokens: Tokens read by all finished sequences, prompts included.
        kept_tokens: By layer that routes: how many of those were in its cache at the end.
        decoder: What made the tokens after the first: fused kernels or the model's own steps.
    """

    new_tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    memory_bytes: int = 0
    read_tokens: int = 0
    kept_tokens: dict[int, int] = field(default_factory=dict)
    decoder: str = ""

    def kept_fraction_per_layer(self) -> dict[int, float]:
        """Share of the tokens read that was kept, by layer that routes."""
        return {layer: kept / self.read_tokens for layer, kept in self.kept_tokens.items()}


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: StopRule | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    prefill_chunk: int | None = None,
    facts: GenerationFacts | None = None,
    on_finished: OnFinished | None = None,
    fused: bool | None = None,
    cache_bytes: int | None = None,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        model: The model, in evaluation mode.
        prompts: Token ids; none may be empty.
        max_new_tokens: Upper limit of new tokens per prompt.
        stop: Called with the new tokens of one prompt; True ends it (the last token is kept).
        batch_size: Most sequences that decode together.
        temperature, top_k, top_p, seed: See `ham.model.sampling.Sampling`. What a prompt gets
            depends on its place in `prompts`, not on the others.
        prefill_chunk: Read prompts in pieces of this many tokens; whole when None.
        facts: Filled in with times, memory and what was kept.
        on_finished: Called when prompts end, with how many have ended and how many there are.
        fused: Whether to decode by fused kernels, on a GPU in a CUDA graph; by default where they
            support the model. See `ham.decoding`.
        cache_bytes: Most bytes for the routed tokens of all layers and sequences; by default what
            the device has.

    Returns:
        The new tokens of each prompt, in the order of `prompts`.

    Raises:
        ConfigError: For an empty or too long prompt, a token outside the vocabulary, or an argument
            outside its legal set.
        NotFiniteError: If logits or routing scores are not finite.
        CachePoolFullError: If the routed tokens need more memory than there may be or is.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    budget = CacheBudget(cache_bytes)
    run = _Run(
        model,
        prompts,
        max_new_tokens,
        stop,
        batch_size,
        sampling,
        prefill_chunk,
        facts,
        fused,
        budget,
    )
    ended = 0
    for _ in run.tokens():
        if on_finished is not None and run.ended > ended:
            ended = run.ended
            on_finished(ended, len(prompts))
    return run.made


def stream(
    model: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop: StopRule | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    prefill_chunk: int | None = None,
    facts: GenerationFacts | None = None,
    fused: bool | None = None,
    cache_bytes: int | None = None,
) -> Iterator[int]:
    """The tokens that `generate` makes of one prompt, each as soon as it is known.

    Arguments and errors are those of `generate`; errors of the arguments come with the call.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    budget = CacheBudget(cache_bytes)
    run = _Run(
        model, [prompt], max_new_tokens, stop, 1, sampling, prefill_chunk, facts, fused, budget
    )
    return (token for _, token in run.tokens())


@dataclass
class _Run:
    """One generation: what was asked, and the sequences that decode at the moment."""

    model: LanguageModel
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    stop: StopRule | None
    batch_size: int
    sampling: Sampling
    prefill_chunk: int | None
    facts: GenerationFacts | None
    fused: bool | None
    budget: CacheBudget
    made: list[list[int]] = field(init=False)
    ended: int = field(init=False, default=0)
    _sources: list[random.Random] = field(init=False)
    _active: list[int] = field(init=False, default_factory=list)
    _stepper: Stepper | None = field(init=False, default=None)
    _logits_BV: Tensor | None = field(init=False, default=None)

    def __post_init__(self):
        for name in ("batch_size", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}; legal: an integer >= 1")
        if self.max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens {self.max_new_tokens}; legal: an integer >= 0")
        _check_prompts(self.model, self.prompts, self.max_new_tokens)
        self.made = [[] for _ in self.prompts]
        self._sources = [self.sampling.random_numbers(index) for index in range(len(self.prompts))]

    @torch.inference_mode()
    def tokens(self) -> Iterator[tuple[int, int]]:
        """Pairs of prompt and new token, in the order in which they are made."""
        begin = time.perf_counter()
        # The longest first: neighbours in the batch are alike, and what does not fit fails early.
        order = sorted(range(len(self.prompts)), key=lambda index: -len(self.prompts[index]))
        waiting = deque(order if self.max_new_tokens else ())
        while waiting or self._active:
            if waiting and 2 * len(self._active) <= self.batch_size:
                room = min(self.batch_size - len(self._active), len(waiting))
                self._admit([waiting.popleft() for _ in range(room)])
            tokens_B = self._choose()
            chosen = list(zip(self._active, tokens_B.tolist(), strict=True))
            self._check_finite(chosen)
            going = self._record(chosen, begin)
            yield from chosen
            self._go_on(tokens_B, going)

    def _admit(self, indices: list[int]) -> None:
        """Prefill prompts, those of one length together, and join them to the batch."""
        by_length: dict[int, list[int]] = {}
        for index in indices:
            by_length.setdefault(len(self.prompts[index]), []).append(index)
        states = [self._stepper.release()] if self._active else []
        logits = [self._logits_BV] if self._active else []
        for bucket in by_length.values():
            state, logits_BV = self._prefill(bucket)
            states.append(state)
            logits.append(logits_BV)
            self._active += bucket
        state = self._joined(states)
        self._stepper = make_stepper(self.model, state, self.fused)
        self._logits_BV = torch.cat(logits)

    def _joined(self, states: list[Memory]) -> Memory:
        """One memory of all sequences; `states` is emptied, so that the old ones can go."""
        if len(states) == 1:
            return states.pop()
        held = sum(state.bytes_allocated().get("kv", 0) for state in states)
        with told_when_out_of_memory(held, self.model.device):
            state = type(states[0]).join(states)
        states.clear()
        # The pools of the joined memory are new.
        self.budget.cover(state)
        return state

    def _prefill(self, bucket: list[int]) -> tuple[Memory, Tensor]:
        rows = [list(self.prompts[index]) for index in bucket]
        tokens_BT = torch.tensor(rows, dtype=torch.int64, device=self.model.device)
        state = self.model.init_state(len(bucket))
        self.budget.cover(state)
        for part_BT in tokens_BT.split(self.prefill_chunk or tokens_BT.shape[1], dim=1):
            output = self.model.prefill(part_BT, state, last_only=True)
            _check_scores(output, bucket)
        return state, output.logits_BTV[:, -1]

    def _choose(self) -> Tensor:
        """Next tokens, and `_NOT_FINITE` where the logits are not: one transfer to the host."""
        sources = [self._sources[index] for index in self._active]
        tokens_B = self.sampling.choose(self._logits_BV, sources)
        return tokens_B.where(self._logits_BV.isfinite().all(dim=-1), _NOT_FINITE)

    def _check_finite(self, chosen: list[tuple[int, int]]) -> None:
        for index, token in chosen:
            if token == _NOT_FINITE:
                raise NotFiniteError(
                    f"prompt {index}: the logits of new token {len(self.made[index])} (from 0) are "
                    "not finite; the model's weights or the numbers it computes with are broken"
                )

    def _record(self, chosen: list[tuple[int, int]], begin: float) -> list[int]:
        """Note the new tokens; returns the rows of the batch that go on."""
        going = []
        for row, (index, token) in enumerate(chosen):
            made = self.made[index]
            made.append(token)
            full = len(made) == self.max_new_tokens
            if not full and not (self.stop is not None and self.stop(made)):
                going.append(row)
        self.ended += len(chosen) - len(going)
        if self.facts is not None:
            self._note_facts(sorted(set(range(len(chosen))) - set(going)), begin)
        return going

    def _note_facts(self, ending: list[int], begin: float) -> None:
        facts, stepper = self.facts, self._stepper
        facts.decoder = stepper.name
        facts.seconds = time.perf_counter() - begin
        if facts.new_tokens == 0:
            facts.first_token_seconds = facts.seconds
        facts.new_tokens += len(self._active)
        held = sum(stepper.bytes_allocated().values())
        facts.memory_bytes = max(facts.memory_bytes, held)
        facts.read_tokens += sum(stepper.lengths[row] for row in ending)
        for layer, kept in (stepper.kept(ending) if ending else {}).items():
            facts.kept_tokens[layer] = facts.kept_tokens.get(layer, 0) + kept

    def _go_on(self, tokens_B: Tensor, going: list[int]) -> None:
        """Let finished sequences leave and advance the others by one token."""
        if not going:
            self._stepper.check()
            self._active, self._stepper, self._logits_BV = [], None, None
            return
        if len(going) < len(self._active):
            self._stepper.select(going)
            tokens_B = tokens_B[torch.tensor(going, device=tokens_B.device)]
            self._active = [self._active[row] for row in going]
        self._logits_BV = self._stepper.step(tokens_B)


def _check_prompts(
    model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    vocabulary, positions = model.config.vocabulary_size, model.config.max_positions
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(f"prompt {index} is empty; begin it with the end-of-text token")
        outside = next((token for token in prompt if not 0 <= token < vocabulary), None)
        if outside is not None:
            raise ConfigError(
                f"prompt {index} has the token {outside}; legal: 0..{vocabulary - 1}, "
                "the model's vocabulary"
            )
        if len(prompt) + max_new_tokens > positions:
            raise ConfigError(
                f"prompt {index} has {len(prompt)} tokens and {max_new_tokens} new ones were asked "
                f"for; together the model reads at most max_positions {positions}"
            )


def _check_scores(output: DecoderOutput, bucket: list[int]) -> None:
    """Refuse routing scores that are NaN: such a token would silently not be kept."""
    scored = [
        (layer, aux.score_BTH if aux.score_BT is None else aux.score_BT)
        for layer, aux in enumerate(output.aux)
        if aux.score_BT is not None or aux.score_BTH is not None
    ]
    if not scored:
        return
    broken_LB = torch.stack([score.isnan().flatten(1).any(dim=1) for _, score in scored])
    for row, column in broken_LB.nonzero().tolist():
        raise NotFiniteError(
            f"prompt {bucket[column]}: a routing score of layer {scored[row][0]} is NaN while the "
            "prompt is read; the model's weights or the numbers it computes with are broken"
        )
