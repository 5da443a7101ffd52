"""Folders of results that several tests share."""

import pytest
from made_results import write_family


@pytest.fixture
def family(tmp_path):
    """Folders of four stages of context extension, which were given the same prompts."""
    return write_family(tmp_path)
