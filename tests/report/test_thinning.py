"""Which points of a curve are kept."""

from __future__ import annotations

import json

from ham.report.thinning import EVERY, thin_layer_curves


def line(metric: str, step: int | None, **labels: int) -> bytes:
    row = {"metric": metric, "x_name": step and "step", "x_value": step, "labels": labels}
    return json.dumps(row).encode() + b"\n"


def test_only_the_curves_of_layers_lose_points() -> None:
    steps = range(1, 3 * EVERY)
    curves = [line("threshold", step, layer=layer) for step in steps for layer in (0, 1)]
    others = [line("loss", step) for step in steps] + [line("kv_fraction", None, layer=0)]
    kept = thin_layer_curves(b"".join(curves + others)).splitlines(keepends=True)
    assert kept[-len(others) :] == others
    for layer in (0, 1):
        rows = [json.loads(one) for one in kept[: -len(others)]]
        found = [row["x_value"] for row in rows if row["labels"]["layer"] == layer]
        assert found == [1, 1 + EVERY, 1 + 2 * EVERY, 3 * EVERY - 1]
