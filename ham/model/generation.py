"""Greedy generation by prefill and step, with the real decoding memory of each architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ham.model.decoder import DecoderLM

StopRule = Callable[[list[int]], bool]


@torch.inference_mode()
def generate(
    model: DecoderLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: StopRule | None = None,
    batch_size: int = 16,
) -> list[list[int]]:
    """Continue each prompt greedily.

    Prompts of equal length share a batch and others do not, so no padding ever reaches a
    recurrent state. Finished sequences leave the batch.

    Args:
        model: The model, in evaluation mode.
        prompts: Token ids; none may be empty.
        max_new_tokens: Upper limit of new tokens per prompt.
        stop: Called with the new tokens of one prompt; True ends it (the last token is kept).
        batch_size: Prompts per batch.

    Returns:
        The new tokens of each prompt, in the order of `prompts`.

    Raises:
        RoutingError: If a routing score of a prompt is not finite.
    """
    results: list[list[int]] = [[] for _ in prompts]
    if max_new_tokens < 1:
        return results
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; begin it with the end-of-text token")
        by_length.setdefault(len(prompt), []).append(index)
    for indices in by_length.values():
        for first in range(0, len(indices), batch_size):
            batch = indices[first : first + batch_size]
            _continue_batch(model, prompts, batch, max_new_tokens, stop, results)
    return results


def _continue_batch(
    model: DecoderLM,
    prompts: Sequence[Sequence[int]],
    batch: list[int],
    max_new_tokens: int,
    stop: StopRule | None,
    results: list[list[int]],
) -> None:
    tokens_BT = torch.tensor([list(prompts[index]) for index in batch], device=model.device)
    state = model.init_state(len(batch))
    logits_BV = model.prefill(tokens_BT, state).logits_BTV[:, -1]
    model.check_scores()
    active = list(batch)
    for made in range(1, max_new_tokens + 1):
        tokens_B = logits_BV.argmax(dim=-1)
        kept = []
        for row, (index, token) in enumerate(zip(active, tokens_B.tolist(), strict=True)):
            results[index].append(token)
            if stop is None or not stop(results[index]):
                kept.append(row)
        if not kept or made == max_new_tokens:
            return
        if len(kept) < len(active):
            rows = torch.tensor(kept, device=model.device)
            state.select(rows)
            tokens_B = tokens_B[rows]
            active = [active[row] for row in kept]
        logits_BV = model.step(tokens_B, state)
