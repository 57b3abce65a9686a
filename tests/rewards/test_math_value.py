"""Numbers and formulas against sympy: equal when it rewrote one into the other, not when it added to it."""

from __future__ import annotations

import random

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.math.grader import grade


def same(gold: str, answer: str) -> bool:
    return grade(f"\\boxed{{{answer}}}", gold).score == 1.0


@given(st.fractions(max_denominator=10**6), st.integers(2, 99))
@settings(max_examples=200, deadline=None)
def test_a_fraction_is_its_unreduced_and_decimal_forms_and_no_neighbour(value, factor):
    gold = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    assert same(gold, f"\\frac{{{value.numerator * factor}}}{{{value.denominator * factor}}}")
    assert same(gold, f"{value.numerator}/{value.denominator}")
    assert not same(gold, f"\\frac{{{value.numerator * factor + 1}}}{{{value.denominator * factor}}}")


def random_polynomial(rng: random.Random) -> sympy.Expr:
    x, y = sympy.symbols("x y")
    terms = [rng.randint(-9, 9) * x ** rng.randint(0, 4) * y ** rng.randint(0, 3) for _ in range(4)]
    return sympy.Add(*terms) * (x - rng.randint(1, 5) * y)


@pytest.mark.parametrize("seed", range(25))
def test_a_polynomial_is_its_expansion_and_not_one_more(seed):
    formula = random_polynomial(random.Random(seed))
    gold, expanded = sympy.latex(formula), sympy.latex(sympy.expand(formula))
    assert same(gold, expanded)
    assert not same(gold, sympy.latex(sympy.expand(formula) + 1))


@pytest.mark.parametrize("seed", range(25))
def test_a_surd_is_what_sympy_simplifies_it_to_and_not_a_thousandth_more(seed):
    rng = random.Random(seed)
    a, b, c = rng.randint(2, 50), rng.randint(2, 50), rng.randint(2, 9)
    formula = sympy.Rational(a, c) * sympy.sqrt(b) + sympy.sqrt(a) / c
    rationalised = sympy.radsimp(sympy.expand(formula * (1 + sympy.sqrt(2))) / (1 + sympy.sqrt(2)))
    assert same(sympy.latex(formula), sympy.latex(rationalised))
    assert not same(sympy.latex(formula), sympy.latex(formula + sympy.Rational(1, 1000)))


IDENTITIES = [
    ("\\sin 3x", "3 \\sin x - 4 \\sin^3 x"),
    ("\\tan(x + y)", "\\frac{\\tan x + \\tan y}{1 - \\tan x \\tan y}"),
    ("\\cosh 2x", "2\\cosh^2 x - 1"),
    ("\\arctan x + \\arctan \\frac{1}{x}", "\\arctan x + \\arctan x^{-1}"),
    ("\\sqrt[3]{2 + \\sqrt{5}}", "\\frac{1 + \\sqrt{5}}{2}"),  # the golden ratio cubed is 2 + sqrt 5
    ("\\cos \\frac{2\\pi}{5}", "\\frac{\\sqrt{5} - 1}{4}"),
    ("\\log_8 x", "\\frac{1}{3} \\log_2 x"),
    ("\\binom{n}{k}", "\\frac{n!}{k!(n-k)!}"),
    ("\\sum_{k=1}^{10} k^2", "385"),  # 10 * 11 * 21 / 6
    ("\\prod_{k=1}^{5} k", "120"),
]


@pytest.mark.parametrize(("left", "right"), IDENTITIES)
def test_identities_hold_and_fail_by_a_sign(left, right):
    assert same(left, right)
    assert not same(left, f"-({right})")


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
        ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}"),
        ("\\frac{2^{2005} + 1}{3 \\cdot 2^{2006}}", "\\frac{1}{6}"),
        ("1 - \\frac{1}{e}", "1 + \\frac{1}{e}"),
        ("\\sqrt{2} + 10^{-60}", "\\sqrt{2}"),
        ("1", "1 + e^{-200}"),
        ("e^{-200}", "e^{-201}"),
        ("0", "e^{-200}"),
        ("10^{100}", "10^{100} + 1"),
        ("\\sqrt{10^{80} + 1}", "10^{40}"),
        ("123456789123456789", "123456789123456788"),
    ],
)
def test_numbers_that_differ_far_behind_the_point_differ(gold, answer):
    assert not same(gold, answer)
