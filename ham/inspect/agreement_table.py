"""What `ham.inspect.agreement` found, as a table for a terminal and as result rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ham.inspect.agreement import NEAR, Agreement, LayerFlips
from ham.inspect.shares import aligned_lines

if TYPE_CHECKING:
    from ham.report.rows import RowWriter

EXPERIMENT = "agreement"


def agreement_lines(found: Agreement) -> list[str]:
    """Pairs of readings down, layers across; a cell is `flips (largest distance)`."""
    names = ", ".join(reading.name for reading in found.readings)
    precision = found.readings[-1].precision
    lines = [f"{found.tokens:,} tokens read in {len(found.readings)} ways, in {precision}: {names}"]
    if found.fused_refusal:
        lines.append(f"no fused steps: {found.fused_refusal}")
    lines.append("flipped decisions (largest |score - threshold| among them)")
    layers = list(found.decisions)
    grid = [["", *(f"layer {layer}" for layer in layers), "largest logit difference"]]
    grid.append(["decisions", *(str(found.decisions[layer]) for layer in layers), ""])
    grid.append([f"within {NEAR:g}", *(str(found.near[layer]) for layer in layers), ""])
    for pair in found.pairs:
        cells = [_cell(flips) for flips in pair.layers]
        name = f"{pair.second.name} against {pair.first.name}"
        grid.append([name, *cells, f"{pair.logit_difference:.2g}"])
    return lines + aligned_lines(grid)


def add_agreement_rows(writer: RowWriter, found: Agreement) -> None:
    """Append the rows of every pair.

    For every layer `flips`, `flip_distance` (0 without flips) and `near_threshold` (decisions
    within `NEAR`, by the parallel scores in float32), of `n` decisions; for the pair
    `logit_difference`, of `n` tokens.
    """
    for pair in found.pairs:
        labels = {
            "form": pair.second.name,
            "against": pair.first.name,
            "precision": pair.second.precision,
        }
        common = {"launch_mode": pair.second.launch_mode}
        for flips in pair.layers:
            values = {
                "flips": flips.flips,
                "flip_distance": flips.distance,
                "near_threshold": found.near[flips.layer],
            }
            for metric, value in values.items():
                writer.add(
                    EXPERIMENT,
                    metric,
                    value,
                    n=found.decisions[flips.layer],
                    kv_fraction=flips.fraction,
                    labels={**labels, "layer": flips.layer},
                    **common,
                )
        writer.add(
            EXPERIMENT,
            "logit_difference",
            pair.logit_difference,
            n=found.tokens,
            labels=labels,
            **common,
        )


def _cell(flips: LayerFlips) -> str:
    return f"{flips.flips} ({flips.distance:.2g})" if flips.flips else "0"
