"""What all benches share.

``make bench`` times them at full size; the test suite runs each once on little data, to see that contenders agree.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))


@pytest.fixture
def size(benchmark):
    """Return a function of the full size and of the one that is enough to test."""
    return lambda full, tested: full if benchmark.enabled else min(full, tested)


@pytest.fixture
def require_memory():
    """Return a function that skips where so many bytes are not free."""

    def check(needed):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        try:
            with open("/proc/meminfo") as file:
                kilobytes = next(line.split()[1] for line in file if line.startswith("MemAvailable"))
            free = int(kilobytes) * 1024
        except (OSError, StopIteration):
            pass
        if free < needed:
            pytest.skip(f"needs {needed / 1e9:.0f} GB of free memory, but {free / 1e9:.0f} are left")

    return check
