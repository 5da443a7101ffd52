"""Folders of results that several tests share."""

import pytest
from made_results import needle_results, trained_to, write


@pytest.fixture
def family(tmp_path):
    """Folders of four stages of context extension, which were given the same prompts."""
    folders = []
    for name, limit in {"4k": 2**12, "64k": 2**16, "256k": 2**18, "1m": 2**20}.items():
        folder = tmp_path / f"demo-{name}"
        write(folder / "abc", needle_results(trained_to(limit), f"demo-{name}", draws=name))
        folders.append(folder)
    return folders
