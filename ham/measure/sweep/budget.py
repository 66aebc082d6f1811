"""How much memory a cell will need, so that one that cannot fit is not tried."""

from __future__ import annotations

import math

import torch

from ham.measure.sweep.grid import (
    EVICTED,
    HAM,
    MIXER_DECODE,
    MODEL_PREFILL,
    MODEL_TRAIN,
    RULE_WINDOW,
    TRANSFORMER,
    WINDOW,
    Cell,
    Scale,
)
from ham.report.formats import byte_size

RESERVE = 1 << 30
"""Bytes left for workspaces, graphs and fragments."""

# Rough bytes a token and layer for each unit of width: what a forward pass holds at its peak, and
# what training keeps for the backward (12 layers of 32,768 tokens: 40 GiB at width 1024). A cell
# that needs more than predicted still ends as a row: running out of memory is caught.
PREFILL_BYTES = 96
TRAIN_BYTES = 100
LOGIT_BYTES = 10
OPTIMISER_BYTES = 16

EVICTION_INTERVAL = 16
"""Tokens that wait for the next eviction, at most."""


def free_bytes(device: torch.device) -> int | None:
    """Bytes that tensors can still get, or None on a device that is not limited here."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached


def cache_bytes(cell: Cell, scale: Scale, element_size: int) -> int:
    """Bytes of the keys and values of a cell, padding to the longest sequence included."""
    tokens = float(cell.context + 1)
    if cell.model == HAM:
        share = cell.fraction or 0.0
        # The longest of many sequences lies a few standard deviations above the mean.
        tokens = min(tokens, share * tokens + 5 * math.sqrt(share * tokens) + 1)
    elif cell.model in (WINDOW, RULE_WINDOW):
        tokens = min(tokens, scale.window)
    elif cell.model == EVICTED:
        tokens = min(tokens, scale.main_fraction * tokens + EVICTION_INTERVAL)
    elif cell.model != TRANSFORMER:
        return 0
    return round(tokens * _token_bytes(cell, scale, element_size))


def full_cache_bytes(cell: Cell, scale: Scale, element_size: int) -> int:
    """Bytes of the keys and values of every token held before the step."""
    return cell.context * _token_bytes(cell, scale, element_size)


def _token_bytes(cell: Cell, scale: Scale, element_size: int) -> int:
    """Keys and values of one token of each sequence, in all layers of the cell."""
    layers = 1 if cell.experiment == MIXER_DECODE else scale.layers
    return 2 * layers * cell.batch * scale.heads * cell.head_dim * element_size


def predicted_bytes(cell: Cell, scale: Scale, element_size: int, parameters: int) -> int:
    """Bytes that a cell allocates beyond what inference weights hold already."""
    tokens = cell.context * cell.batch
    if cell.experiment == MODEL_TRAIN:
        kept = tokens * (TRAIN_BYTES * scale.layers * scale.width + LOGIT_BYTES * scale.vocabulary)
        return kept + OPTIMISER_BYTES * parameters
    caches = cache_bytes(cell, scale, element_size)
    if cell.experiment == MODEL_PREFILL:
        # A graph keeps the keys and values of all tokens until the routed ones have their pages.
        waiting = full_cache_bytes(cell, scale, element_size) if cell.model == HAM else 0
        return caches + waiting + PREFILL_BYTES * tokens * scale.width
    return caches


def refusal(needed: int, free: int | None) -> str | None:
    """Why a cell is not tried, or None if it may fit."""
    if free is None or needed + RESERVE <= free:
        return None
    return f"out of memory: needs {byte_size(needed)}, {byte_size(max(0, free - RESERVE))} free"
