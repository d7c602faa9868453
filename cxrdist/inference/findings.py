"""What people are shown of a prediction: the number of a finding, whether it is positive, and the order of findings."""

from cxrdist.inference.predictor import Prediction

LIKELY = 0.5  # a finding that is shown, and mapped, where there is no threshold
NOT_CALIBRATED = (
    "no calibration: these are the model's raw scores, and 0.5 is no threshold (the loss is weighted); "
    "see `cxrdist calibrate`"
)


def shown_prob(found: Prediction, row: int, label: int) -> float:
    return float((found.probabilities if found.calibrated is None else found.calibrated)[row, label])


def is_positive(found: Prediction, row: int, label: int) -> bool:
    """Whether a finding is at or above its threshold; without one, whether it is more likely than not."""
    if found.decisions is not None:
        return bool(found.decisions[row, label] == 1)
    return shown_prob(found, row, label) >= LIKELY


def ranked(found: Prediction, row: int) -> list[int]:
    """The labels' places: positive ones first, then by probability."""
    order = range(len(found.labels))
    return sorted(order, key=lambda label: (not is_positive(found, row, label), -shown_prob(found, row, label)))
