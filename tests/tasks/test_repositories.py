"""Repositories as one text: what the order of their files rests on."""

import re

import pytest

from yoco_eval.tasks.repositories import is_source, join


def order(files):
    """The paths in the joined text, in order."""
    return re.findall(r"^(?:#|//) (\S+)$", join(files), re.MULTILINE)


def test_each_file_stands_under_its_path():
    files = {"b.go": "package b\n", "a.py": "\nx = 1\n\n", "README.md": "# A\n", "empty.py": " \n"}
    assert join(files) == "# a.py\nx = 1\n\n// b.go\npackage b"
    assert [path for path in files if is_source(path)] == ["b.go", "a.py", "empty.py"]
    assert join({"./a/../a.py": "x"}) == "# a/../a.py\nx"


@pytest.mark.parametrize(
    "statement",
    [
        "import pkg.z",
        "import os, pkg.z as z  # and more",
        "from pkg.z import name",
        "from pkg import z",
        "from pkg import (\n    other,\n    z as y,\n)",
        "from .z import name",
        "from . import z",
        "from ..pkg.z import name",
        "def f():\n    from pkg.z import name",
        "try:\n    import pkg.z\nexcept ImportError:\n    print 'Python 2'",
    ],
)
@pytest.mark.parametrize("root", ["", "src/"])
def test_imported_files_come_first(statement, root):
    files = {f"{root}pkg/a.py": statement, f"{root}pkg/z.py": "name = 1"}
    assert order(files) == sorted(files, reverse=True)
    files[f"{root}pkg/__init__.py"] = "version = 1"
    ordered = order(files)
    assert ordered.index(f"{root}pkg/z.py") < ordered.index(f"{root}pkg/a.py")


@pytest.mark.parametrize(
    "statement", ["import z", "from z import name", "from .... import z", "import_z = 'pkg.z'", "z"]
)
def test_what_names_no_file_changes_nothing(statement):
    files = {"pkg/__init__.py": "version = 1", "pkg/a.py": statement, "pkg/z.py": "name = 1"}
    assert order(files) == sorted(files)


def test_packages_stand_for_what_they_hold_themselves():
    files = {"a.py": "from pkg import name", "pkg/__init__.py": "name = 1", "pkg/b.py": "x = 1"}
    assert order(files) == ["pkg/__init__.py", "a.py", "pkg/b.py"]


def test_circles_go_by_path():
    files = {"a.py": "import b", "b.py": "import c", "c.py": "import a", "d.py": "import d"}
    assert order(files) == ["c.py", "b.py", "a.py", "d.py"]
    assert order(dict(reversed(files.items()))) == order(files)


def test_imports_deeper_than_the_call_stack():
    files = {f"m{i:04}.py": f"import m{i + 1:04}" for i in range(3000)}
    assert order(files) == sorted(files, reverse=True)
