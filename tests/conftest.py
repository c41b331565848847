"""Settings all tests share."""

from __future__ import annotations

import os

# On few cores, libraries that start a thread per core would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

settings.register_profile("offramp", deadline=None, print_blob=True)
settings.load_profile("offramp")
