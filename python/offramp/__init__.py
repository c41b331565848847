"""Early exits for language models, calibrated exactly.

The calibration functions need numpy only.  Names that need torch and transformers are resolved on first use,
so ``import offramp`` never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from offramp import reference
from offramp._core import __version__
from offramp.calibration import ThresholdCurve, fast_calibrate, sort_by_score, threshold_curve
from offramp.cascade import calibrate_cascade
from offramp.decision import Decision, decide, top2_margin
from offramp.errors import (
    AgreementError,
    InputError,
    ModelError,
    OfframpError,
    OutOfMemoryError,
    StorageError,
)
from offramp.guarantee import certify
from offramp.monitor import Monitor
from offramp.outcomes import Cascade, Certificate

if TYPE_CHECKING:
    from offramp.llm.calibrating import Calibration
    from offramp.llm.heads import ExitHead, HeadConfig, register_head
    from offramp.llm.loading import load_model
    from offramp.llm.model import EarlyExitModel
    from offramp.llm.scoring import Scores

_LANGUAGE_MODEL_NAMES = {
    "Calibration": "offramp.llm.calibrating",
    "EarlyExitModel": "offramp.llm.model",
    "ExitHead": "offramp.llm.heads",
    "HeadConfig": "offramp.llm.heads",
    "Scores": "offramp.llm.scoring",
    "load_model": "offramp.llm.loading",
    "register_head": "offramp.llm.heads",
}

__all__ = [
    "AgreementError",
    "Calibration",
    "Cascade",
    "Certificate",
    "Decision",
    "EarlyExitModel",
    "ExitHead",
    "HeadConfig",
    "InputError",
    "ModelError",
    "Monitor",
    "OfframpError",
    "OutOfMemoryError",
    "Scores",
    "StorageError",
    "ThresholdCurve",
    "__version__",
    "calibrate_cascade",
    "certify",
    "decide",
    "fast_calibrate",
    "load_model",
    "reference",
    "register_head",
    "sort_by_score",
    "threshold_curve",
    "top2_margin",
]


def __getattr__(name: str) -> Any:
    if name not in _LANGUAGE_MODEL_NAMES:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}")
    try:
        value = getattr(import_module(_LANGUAGE_MODEL_NAMES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in {"torch", "transformers", "safetensors", "accelerate"}:
            raise ImportError(
                f"offramp.{name} needs {error.name}: install it with `pip install offramp[llm]`"
            ) from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
