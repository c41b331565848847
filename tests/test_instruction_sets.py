"""Every instruction set the processor has runs the same tests; one is chosen for a process by OFFRAMP_ISA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from offramp import _core

HERE = Path(__file__).parent


OTHERS = [isa for isa in _core.instruction_sets() if isa != _core.instruction_set()]


def environment(isa):
    return {**os.environ, "OFFRAMP_ISA": isa, "OMP_NUM_THREADS": "1"}


def run(*command, isa):
    return subprocess.run(
        [sys.executable, *command],
        env=environment(isa),
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """The tests under each of the others, all at the same time, and where they write."""
    folder = tmp_path_factory.mktemp("isa")
    files = [*sorted(HERE.glob("test_decision*.py")), HERE / "test_calibration_paths.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    started = {}
    for isa in OTHERS:
        with (folder / isa).open("w") as output:
            process = subprocess.Popen(
                command, env=environment(isa), stdout=output, stderr=subprocess.STDOUT, cwd=HERE
            )
        started[isa] = (process, folder / isa)
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


def test_the_last_is_chosen_unless_the_environment_names_another():
    wanted = os.environ.get("OFFRAMP_ISA", _core.instruction_sets()[-1])
    assert _core.instruction_set() == wanted
    assert _core.instruction_sets()[0] == "portable"


@pytest.mark.parametrize("isa", OTHERS)
def test_the_others_pass_the_same_tests(isa, running):
    chosen = run("-c", "from offramp import _core; print(_core.instruction_set())", isa=isa)
    assert chosen.stdout.strip() == isa
    process, output = running[isa]
    process.wait()
    written = output.read_text()
    assert process.returncode == 0, written
    assert " passed" in written
    assert "failed" not in written


def test_an_unknown_one_is_refused():
    for call in ("top2_margin([1.0, 2.0])", "fast_calibrate([0.5], [1], 0.5)"):
        refused = run("-c", f"import offramp; offramp.{call}", isa="abacus")
        assert (
            'ValueError: OFFRAMP_ISA is "abacus": unset it, or use one this processor has: portable'
            in refused.stderr
        )
