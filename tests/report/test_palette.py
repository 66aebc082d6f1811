from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import yaml

from ham.fingerprint import repository_root
from ham.report.palette import (
    EXTRA_COLORS,
    KNOWN_STYLES,
    model_styles,
    on_dark,
    order_models,
    shades,
)

CONFIGS = repository_root() / "workflow/config"
# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
SIGHTS = {
    "all cones": np.eye(3),
    "no red cones": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "no green cones": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.01182, 0.04294, 0.968881],
        ]
    ),
}
TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
) / np.array([[0.9505], [1.0], [1.089]])


def lab(color: str, sight: str) -> tuple[float, float, float]:
    """CIE L*a*b* of a colour as an eye with these cones sees it."""
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(TO_XYZ @ np.clip(SIGHTS[sight] @ linear, 0.01, 1))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


UNKNOWN = ["my-layer", "ham-other", "rwkv", "retnet", "hola", "gsa", "bmojo"]


def test_known_arms_have_fixed_styles_in_any_company():
    for others in ([], UNKNOWN):
        styles = model_styles([*KNOWN_STYLES, *others])
        assert {name: styles[name] for name in KNOWN_STYLES} == KNOWN_STYLES


def test_no_two_models_look_alike():
    styles = model_styles([*KNOWN_STYLES, *UNKNOWN])
    pairs = [(style.color, style.marker, style.dash) for style in styles.values()]
    assert len(set(pairs)) == len(pairs)
    few = model_styles(UNKNOWN[: len(EXTRA_COLORS)])
    assert {style.color for style in few.values()} == set(EXTRA_COLORS)
    assert not {style.color for style in KNOWN_STYLES.values()} & set(EXTRA_COLORS)


@pytest.mark.parametrize("name", ["h100", "h100-c", "mqar"])
def test_arms_of_a_comparison_differ_in_color_marker_or_dash(name):
    arms = [arm["name"] for arm in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["arms"]]
    styles = model_styles(arms)
    drawn = {(style.color, style.marker, style.dash) for style in styles.values()}
    assert len(drawn) == len(arms)
    if name == "h100":
        assert set(arms) <= KNOWN_STYLES.keys()


def test_an_arm_at_half_is_drawn_like_its_whole_with_half_a_marker():
    for whole, half in (
        ("ham-cosine", "ham-cosine-0.5"),
        ("ham-random", "ham-random-0.5"),
        ("hybrid-3-to-1", "hybrid-1-to-1"),
        ("delta-rule-window", "delta-rule-window-0.5"),
    ):
        one, other = KNOWN_STYLES[whole], KNOWN_STYLES[half]
        assert (one.color, one.marker, one.half) == (other.color, other.marker, False)
        assert other.half and other.dash == "--" != one.dash


@pytest.mark.parametrize("sight", SIGHTS)
def test_colors_stay_apart_for_every_eye(sight):
    colors = sorted({style.color for style in KNOWN_STYLES.values()} - {"#7a7a7a"})
    for one, other in itertools.combinations(colors, 2):
        assert math.dist(lab(one, sight), lab(other, sight)) > 12, (one, other)


def test_unknown_arms_do_not_depend_on_the_order_of_rows():
    expected = model_styles(UNKNOWN)
    for order in itertools.islice(itertools.permutations(UNKNOWN), 20):
        assert model_styles(order) == expected


def test_many_unknown_arms_still_differ():
    names = [f"arm-{index}" for index in range(30)]
    styles = model_styles(names)
    assert len({(style.color, style.marker) for style in styles.values()}) == 30


def test_order():
    models = ["zeta", "ham-cosine", "alpha", "transformer"]
    assert order_models(models) == ["transformer", "ham-cosine", "alpha", "zeta"]


def test_shades_begin_with_the_color_itself():
    assert shades("#d55e00", 3)[0] == "#d55e00"
    assert len(set(shades("#d55e00", 3))) == 3


def test_dark_pages_get_lighter_colors_only_where_needed():
    assert on_dark("#56b4e9") == "#56b4e9"
    assert on_dark("#0072b2") > "#0072b2"
