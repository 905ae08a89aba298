"""The whole cube: every kernel × placement × rule × estimator in the bound guidance, and end to end every sampler ×
kernel × placement, with rules and estimators in turn.

For each triple one rule and estimator is drawn so that over the samplers every rule and both estimators meet every
kernel and placement.
"""

import itertools

import pytest
from test_contract import PAIRS, check, check_bound, guidance_of

from examples import KERNELS, SAMPLERS, rules_of


def combinations():
    for (i, sampler), (kernel, at) in itertools.product(enumerate(SAMPLERS), PAIRS):
        rules, number = rules_of(KERNELS[kernel], at), list(KERNELS).index(kernel)
        yield sampler, kernel, at, rules[(i + number) % len(rules)], "uv"[(i // 2 + number) % 2]


@pytest.mark.parametrize(("sampler", "kernel", "at", "rule", "estimator"), list(combinations()))
def test_cube(sampler, kernel, at, rule, estimator):
    check(sampler, kernel, at, rule, estimator)


@pytest.mark.parametrize(("kernel", "at"), PAIRS)
def test_bound_cube(kernel, at):
    rules = rules_of(KERNELS[kernel], at)
    check_bound([guidance_of(kernel, at, rule, estimator) for rule in rules for estimator in "uv"])
