"""TRL itself, executed on random batches: ours in float64 computes the same function. The benchmark tells of float32."""

import pytest

from benchmarks import trl_parity

pytestmark = pytest.mark.parity

SEEDS = range(100, 105)
RTOL = {"float64": 1e-10, "both": 1e-6, "float32": 5e-6}
"""By what TRL computes in."""


@pytest.mark.parametrize("name", trl_parity.CASES)
def test_loss_and_gradient_equal_trl(name):
    case = trl_parity.CASES[name]
    difference = trl_parity.compare(case, SEEDS, double=True)
    assert max(difference.terms, difference.gradient) < RTOL[case.trl_precision], difference
