"""The wheel as a user gets it: `make wheel`, then pip install into an empty environment that has no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import sys
import numpy as np
import offramp

scores = np.array([0.2, 0.5, 0.7, 0.9], dtype=np.float32)
assert offramp.fast_calibrate(scores, np.array([0, 1, 0, 1]), 0.6) == 0.5
assert offramp.reference.fast_calibrate(scores, np.array([0, 1, 0, 1]), 0.6) == 0.5
assert offramp.decide(scores, 0.01).token == 3
assert "torch" not in sys.modules
try:
    import torch
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("torch is here, so this shows nothing")
try:
    offramp.EarlyExitModel
except ImportError as error:
    print(error)
"""

pytestmark = pytest.mark.slow


def run(*command, **settings):
    # Another project's path or environment must not reach into the new one.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        **settings,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if shutil.which("cargo") is None:
        pytest.skip("needs cargo")
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--wheel-dir", folder, ROOT,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


def test_one_wheel_serves_every_python_from_3_11(wheel):
    assert wheel.name.startswith("offramp-")
    assert "-cp311-abi3-" in wheel.name


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"offramp", "offramp_lm_eval", next(top for top in tops if top.endswith(".dist-info"))}
    # Torch, wherever it is imported, loads this one.
    assert "offramp_lm_eval/__init__.py" in names
    for needed in ("py.typed", "_core.pyi", "llm/prompts.toml", "evaluation/report.html.j2"):
        assert f"offramp/{needed}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_calibrates_without_torch(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "clean")
    python = tmp_path / "clean" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    said = run(python, "-c", USE, cwd=tmp_path)
    assert "pip install" in said
    installed = run(python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check")
    assert {line.split("==")[0].lower() for line in installed.split()} <= {
        "offramp",
        "numpy",
        "pip",
        "setuptools",
    }
