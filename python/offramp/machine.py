"""What a number was measured on: versions, processor, threads.  Imports neither torch nor transformers."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import offramp
from offramp import _core

PACKAGES = ("numpy", "torch", "transformers", "safetensors", "accelerate", "click", "rich", "matplotlib")
# The instruction sets that could matter to the core, as Linux spells them.
_FEATURES = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_vbmi2",
    "asimd",
    "sve",
)


def versions() -> dict[str, str | None]:
    """Map offramp, Python and the packages offramp uses to their versions; None if not installed."""
    found: dict[str, str | None] = {"offramp": offramp.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def processor() -> str:
    """Name the processor."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def features() -> list[str]:
    """List the processor's instruction sets that matter here; empty where the system does not tell."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [name for name in _FEATURES if name in flags]


def cores() -> int:
    """Count the processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, str]:
    """Describe machine and versions in the few lines a report needs."""
    found = {name: value for name, value in versions().items() if value is not None}
    return {
        "processor": f"{processor()}, {cores()} cores",
        "system": f"{platform.system()} {platform.machine()}",
        "versions": ", ".join(
            f"{name} {found[name]}"
            for name in ("offramp", "python", "numpy", "torch", "transformers")
            if name in found
        ),
    }


def instruction_set() -> str:
    """Name the code path the core chose for this processor."""
    return _core.instruction_set()


def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
