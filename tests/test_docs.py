"""The examples people copy: those of the README and of the docstrings run as they stand."""

import contextlib
import doctest
import importlib
import io
import json
import re
from pathlib import Path

import pytest
from offramp.evaluation.tables import read_csv

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
    for name in (
        "README.md",
        "docs/method.md",
        "docs/guarantees.md",
        "docs/how-to.md",
        "docs/training.md",
        "docs/paper.md",
        "docs/speed.md",
    ):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            if not link.startswith("https://"):
                assert ((ROOT / name).parent / link).exists(), (name, link)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0


# A comment above a table says which rows of which file it shows, and how.
MEASURED = re.compile(r"<!-- from (\S+) (\{.*\}) -->\n((?:\|.*\n)+)")


def table_of(page, file, shown):
    """The table a comment asks for, as Markdown."""
    wanted = {name: value if isinstance(value, list) else [value] for name, value in shown["where"].items()}
    rows = [
        row
        for row in read_csv((ROOT / page).parent / file)
        if all(row[name] in values for name, values in wanted.items())
    ]
    assert rows, (file, shown)
    cells = [list(shown["columns"]), ["---"] * len(shown["columns"])]
    cells += [[_shown(form.format(**row)) for form in shown["columns"].values()] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def _shown(cell):
    """A dash for what there is not, and a word for a threshold no score reaches."""
    cell = re.sub(r"[+-]?nan%?( \[.*\])?", "–", cell)
    return re.sub(r"^inf$", "never", cell)


@pytest.mark.parametrize(
    "page", ["docs/paper.md", "docs/benchmarks.md", "docs/speed.md", "docs/training.md", "README.md"]
)
def test_measured_numbers_are_those_of_their_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    tables = MEASURED.findall(text)
    assert len(tables) == text.count("<!-- from ") > 0
    for file, shown, table in tables:
        assert table == table_of(page, file, json.loads(shown))


def test_prose_about_the_paper_has_no_numbers_of_its_own():
    text = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    tables = " ".join(table for _, _, table in MEASURED.findall(text))
    prose = re.sub(r"<!--.*?-->|```.*?```|`[^`]*`|^\|[^\n]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    # Not measured but chosen, or names: λ, ε, seconds allowed, versions, papers.
    prose = re.sub(r"(λ|ε) ?= ?[\d.]+(, [\d.]+)*|arXiv \S+|torch \S+|transformers \S+", "", prose)
    known = re.findall(r"\d+\.\d+", tables)
    assert [number for number in re.findall(r"\d+\.\d+", prose) if number not in known] == []
