from __future__ import annotations

import itertools

from ham.report.palette import (
    EXTRA_COLORS,
    KNOWN_STYLES,
    model_styles,
    on_dark,
    order_models,
    shades,
)

UNKNOWN = ["my-layer", "ham-random", "rwkv", "retnet", "hola", "gsa", "bmojo"]


def test_known_arms_have_fixed_styles_in_any_company():
    for others in ([], UNKNOWN):
        styles = model_styles([*KNOWN_STYLES, *others])
        assert {name: styles[name] for name in KNOWN_STYLES} == KNOWN_STYLES


def test_no_two_models_look_alike():
    styles = model_styles([*KNOWN_STYLES, *UNKNOWN])
    pairs = [(style.color, style.marker) for style in styles.values()]
    assert len(set(pairs)) == len(pairs)
    few = model_styles(UNKNOWN[: len(EXTRA_COLORS)])
    assert {style.color for style in few.values()} == set(EXTRA_COLORS)
    assert not {style.color for style in KNOWN_STYLES.values()} & set(EXTRA_COLORS)


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
