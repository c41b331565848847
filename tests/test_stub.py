"""The type stub of the compiled module says what the module holds."""

from __future__ import annotations

import subprocess
import sys


def test_stub_matches_the_compiled_module(tmp_path):
    # Only the stub matters here: following the package's imports would analyse all of torch.
    config = tmp_path / "mypy.ini"
    config.write_text(
        f"[mypy]\nfollow_imports = skip\ncache_dir = {tmp_path}\n[mypy-numpy.*]\nfollow_imports = silent\n"
    )
    command = [sys.executable, "-m", "mypy.stubtest", "offramp._core", "--mypy-config-file", str(config)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
