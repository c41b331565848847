"""Makes the model ``offramp`` known to lm-evaluation-harness's own command, without loading either.

The harness loads no models of other packages, but it imports torch, and torch calls what installed packages name under
the entry point ``torch.backends`` (its autoload of extensions; ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns it off).
pyproject.toml names `announce` there.  This is a package of its own, so that whoever imports torch loads these lines
and no more; nothing else may import it.
"""

from __future__ import annotations

import contextlib
import sys


def announce() -> None:
    """Tell the harness, if it is what imports torch, where its model ``offramp`` is found once asked for."""
    if "lm_eval" not in sys.modules:
        return
    # A harness of another shape must not keep torch from being imported.
    with contextlib.suppress(ImportError, AttributeError, TypeError, ValueError):
        # First, since the harness lists its own models only where none is registered yet.
        import lm_eval.models  # noqa: F401, PLC0415
        from lm_eval.api.registry import model_registry  # noqa: PLC0415

        model_registry.register("offramp", target="offramp.evaluation.harness:OfframpLM")
