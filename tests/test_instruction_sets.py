"""Every instruction set the processor has runs the same tests; one is chosen for a process by OFFRAMP_ISA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from offramp import _core

HERE = Path(__file__).parent


def run(*command, isa):
    environment = {**os.environ, "OFFRAMP_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, cwd=HERE
    )


def test_the_last_is_chosen_unless_the_environment_names_another():
    wanted = os.environ.get("OFFRAMP_ISA", _core.instruction_sets()[-1])
    assert _core.instruction_set() == wanted
    assert _core.instruction_sets()[0] == "portable"


@pytest.mark.parametrize("isa", [isa for isa in _core.instruction_sets() if isa != _core.instruction_set()])
def test_the_others_pass_the_same_tests(isa):
    chosen = run("-c", "from offramp import _core; print(_core.instruction_set())", isa=isa)
    assert chosen.stdout.strip() == isa
    files = [*sorted(HERE.glob("test_decision*.py")), HERE / "test_calibration_paths.py"]
    tests = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files), isa=isa)
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert " passed" in tests.stdout
    assert "failed" not in tests.stdout


def test_an_unknown_one_is_refused():
    for call in ("top2_margin([1.0, 2.0])", "fast_calibrate([0.5], [1], 0.5)"):
        refused = run("-c", f"import offramp; offramp.{call}", isa="abacus")
        assert (
            'ValueError: OFFRAMP_ISA is "abacus": unset it, or use one this processor has: portable'
            in refused.stderr
        )
