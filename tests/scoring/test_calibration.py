"""Reliability and temperature on data whose overconfidence is known."""

import numpy as np
import pytest

from cxrdist.scoring import calibration

pytestmark = pytest.mark.fast


def test_temperature_recovers_an_overconfidence_and_reliability_sees_it():
    rng = np.random.default_rng(1)
    logit = rng.normal(size=20000) * 1.5
    truth = rng.random(20000) < 1 / (1 + np.exp(-logit))
    probs = 1 / (1 + np.exp(-3 * logit))
    assert calibration.temperature(truth, probs) == pytest.approx(3, rel=0.08)
    honest = calibration.reliability(truth, 1 / (1 + np.exp(-logit)))
    assert honest.expected_error < 0.02 < calibration.reliability(truth, probs).expected_error
    assert honest.count.sum() == 20000
