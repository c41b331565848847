"""The examples people copy: those of the README and of the docstrings run as they stand."""

import contextlib
import doctest
import importlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "offramp.calibration",
    "offramp.cascade",
    "offramp.decision",
    "offramp.guarantee",
    "offramp.llm.prompts",
    "offramp.monitor",
)


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readmes_calibration_example_prints_what_it_says():
    (example,) = [block for block in blocks("README.md", "python") if "rng" in block]
    (expected,) = blocks("README.md", "text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    assert printed.getvalue() == expected


def test_the_readmes_links_lead_somewhere():
    for name in ("README.md", "docs/method.md", "docs/guarantees.md", "docs/how-to.md", "docs/training.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            if not link.startswith("https://"):
                assert ((ROOT / name).parent / link).exists(), (name, link)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0
