"""Every kind of fault once, in one run."""

from __future__ import annotations

import subprocess
import sys

import fault_helpers as faults
import pytest


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_chaos_every_fault_once(tmp_path):
    script = faults.ROOT / "scripts" / "chaos.py"
    done = subprocess.run(
        [sys.executable, str(script), f"--folder={tmp_path / 'chaos'}"],
        env=faults.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
