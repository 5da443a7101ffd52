"""Damaged and malicious files of every kind: each works, or ends in one harmless line of error."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and asks Linux what they take")
def test_damaged_files_are_read_or_refused_in_one_line():
    """In a process of its own, which forks: this one may have threads."""
    fuzz = Path(__file__).with_name("fuzz.py")
    done = subprocess.run(
        [sys.executable, str(fuzz), "--cases", "600"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
