"""A repository's source code as one text: imported files before those that import them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

# Source code by the suffix of its file, and how a comment begins there.
_COMMENTS = {
    **dict.fromkeys(".py .pyi .pyx .rb .sh".split(), "#"),
    **dict.fromkeys(".c .cc .cpp .cs .cu .cuh .go .h .hpp .java .js .jsx .kt".split(), "//"),
    **dict.fromkeys(".php .rs .scala .swift .ts .tsx".split(), "//"),
}
# Python's import statements, found without parsing: a file may be of any version of Python.
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n;#]+)"
    r"|import[ \t]+([^\n;#]+))",
    re.MULTILINE,
)
_NAME = re.compile(r"([\w.]+)(?:\s+as\s+\w+)?")


def is_source(path: str) -> bool:
    """Whether a file is source code, as far as the suffix of its path tells."""
    return PurePosixPath(path).suffix in _COMMENTS


def join(files: Mapping[str, str]) -> str:
    """The source code among `files` (contents by path), each file under a comment with its path.

    Python files follow what they import; files of other languages, and circles of imports, go by
    path. Files without text are left out.
    """
    sources = {
        str(PurePosixPath(path)): text.strip()
        for path, text in files.items()
        if is_source(path) and text.strip()
    }
    return "\n\n".join(
        f"{_COMMENTS[PurePosixPath(path).suffix]} {path}\n{sources[path]}"
        for path in _imported_first(sources)
    )


def _imported_first(sources: Mapping[str, str]) -> Iterable[str]:
    modules = _modules(sources)
    ordered: dict[str, None] = {}
    seen: set[str] = set()
    # A walk from each file to what it imports; imports may go deeper than Python's call stack.
    path_to_here = sorted(sources, reverse=True)
    while path_to_here:
        path = path_to_here[-1]
        if path in seen:  # and so is by now all that it imports
            ordered[path_to_here.pop()] = None
        else:
            seen.add(path)
            imported = set(_imported(path, sources[path], modules)) - seen
            path_to_here += sorted(imported, reverse=True)
    return ordered


def _modules(paths: Iterable[str]) -> dict[str, str]:
    """Files by their modules' names; with a dot before it, a name starts at the repository's root.

    Other names may start in any folder that is not a package; of two files with one name the first
    has it.
    """
    files = [PurePosixPath(path) for path in sorted(paths) if _is_python(path)]
    packages = {file.parent for file in files if file.stem == "__init__"}
    modules: dict[str, str] = {}
    for file in files:
        name = file.parent if file.stem == "__init__" else file.with_suffix("")
        modules.setdefault("." + ".".join(name.parts), str(file))
        for folder in name.parents:
            if folder not in packages:
                modules.setdefault(".".join(name.relative_to(folder).parts), str(file))
    return modules


def _imported(path: str, source: str, modules: Mapping[str, str]) -> Iterator[str]:
    """The files that a Python file imports."""
    if not _is_python(path):
        return
    for module, members, plain in _IMPORT.findall(source):
        if module.startswith("."):
            below = module.lstrip(".")
            folders = path.split("/")[: len(below) - len(module)]
            module = "".join(f".{part}" for part in [*folders, *below.split(".")] if part)
        for name in _NAME.findall(members or plain):
            # What is imported from a package may be a module of its own, else is in __init__.py.
            found = modules.get(name if plain else f"{module}.{name}") or modules.get(module)
            if found is not None:
                yield found


def _is_python(path: str) -> bool:
    return path.endswith((".py", ".pyi"))
