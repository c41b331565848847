"""The specification: the same functions as the compiled core, in plain readable numpy, with the same results.

Slow on purpose.  Where a function here and its fast namesake differ, one of them has a bug.
Module ``monitor`` has what the bets of `offramp.Monitor` come to.
"""

from offramp.reference import monitor
from offramp.reference.calibration import ThresholdCurve, fast_calibrate, sort_by_score, threshold_curve
from offramp.reference.cascade import calibrate_cascade
from offramp.reference.decision import Decision, decide, top2_margin
from offramp.reference.guarantee import certify

__all__ = [
    "Decision",
    "ThresholdCurve",
    "calibrate_cascade",
    "certify",
    "decide",
    "fast_calibrate",
    "monitor",
    "sort_by_score",
    "threshold_curve",
    "top2_margin",
]
