"""Settings all tests share."""

from __future__ import annotations

import os

# On few cores, libraries that start a thread per core would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

settings.register_profile("offramp", deadline=None, print_blob=True)
settings.load_profile("offramp")


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """Where the demo model is unpacked by the first test that loads it, for all the others."""
    return tmp_path_factory.mktemp("demo-model")


@pytest.fixture
def own_tasks_only(monkeypatch):
    """Spare the listing of the harness's own thousands of tasks, which takes it seconds."""
    from lm_eval.tasks import TaskManager

    real = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager,
        "__init__",
        lambda *arguments, **options: real(*arguments, **options | {"include_defaults": False}),
    )
