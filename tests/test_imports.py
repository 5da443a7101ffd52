"""Who may import whom, read from the source: no import is run.

Imports inside functions count; those of types alone, which never run, count where a room ends.
"""

import ast
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TYPE_CHECKING = ast.dump(ast.Name("TYPE_CHECKING", ast.Load()))
FOLDERS = {
    "yoco_eval": "yoco_eval",
    "yoco_eval.kernels": "kernels",
    "yoco_eval.model": "model",
    "yoco_eval.model.mixers": "model/mixers",
    "yoco_eval.reports": "reports",
    "yoco_eval.tasks": "tasks",
}

# Of each room, what its modules may import beside each other and Python's own: packages, and
# modules of this one, which stand for all that lies in them.
MAY_IMPORT = {
    "kernels": {"flash_attn", "numpy", "torch", "triton"},
    "model": {
        "huggingface_hub",
        "numpy",
        "safetensors",
        "torch",
        "yoco_eval.kernels",
        "yoco_eval.printable",
    },
    "tasks": {
        "datasets",
        "lm_eval",
        "nltk",
        "numpy",
        "tqdm",
        "transformers",
        "yoco_eval.encoding",
        "yoco_eval.lengths",
        "yoco_eval.registration",
        "yoco_eval.tokenizers",
    },
    "reports": {
        "huggingface_hub",
        "jinja2",
        "lm_eval",
        "markupsafe",
        "matplotlib",
        "numpy",
        "rich",
        "scipy",
        "yoco_eval.__version__",
        "yoco_eval.lengths",
        "yoco_eval.printable",
        "yoco_eval.tasks",
    },
}
# Of each room, what its modules do not load through others, either.
NEVER_LOADS = {
    "kernels": {"yoco_eval.model"},
    "tasks": {"yoco_eval.kernels", "yoco_eval.model"},
    "reports": {"yoco_eval.kernels", "yoco_eval.model"},
}
# Of modules, what they do not import at once, nor through others: it takes long, and is imported
# where it is needed.
LATER = {
    "yoco_eval.cli": {"lm_eval", "matplotlib", "numpy", "rich", "torch"},
    "yoco_eval.profiling": {"matplotlib"},
    "yoco_eval.reports.profile_files": {"matplotlib"},
}
WITHOUT_CIRCLES = ["kernels", "model", "reports", "tasks", "yoco_eval"]


@cache
def modules() -> dict[str, ast.Module]:
    """The product's modules by name, parsed."""
    return {
        ".".join((package, *(path.stem,) * (path.stem != "__init__"))): ast.parse(path.read_text())
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).glob("*.py")
    }


def package_of(module: str) -> str:
    return module if module in FOLDERS else module.rpartition(".")[0]


def members(room: str) -> set[str]:
    rooms = {module: Path(FOLDERS[package_of(module)]).parts[0] for module in modules()}
    return {module for module, of in rooms.items() if of == room}


@cache
def imports(module: str, types: bool, later: bool = True) -> set[str]:
    """Full names of all that a module imports, be they of modules or of what is in them.

    types: also of what it imports for its annotations alone.
    later: also of what its functions import once they are called.
    """
    names, rest = set(), [modules()[module]]
    while rest:
        node = rest.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            path = package_of(module).split(".")[: 1 - node.level or None] if node.level else []
            source = ".".join((*path, *filter(None, [node.module])))
            names |= {f"{source}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and ast.dump(node.test) == TYPE_CHECKING and not types:
            rest += node.orelse
        elif later or not isinstance(node, ast.FunctionDef):
            rest += (part for part in ast.iter_child_nodes(node) if not isinstance(part, ast.expr))
    return names


def loads(module: str, types: bool = False, later: bool = True) -> set[str]:
    """The product's modules that it imports when it runs."""
    names = imports(module, types, later)
    return {part for name in names for part in (name, name.rpartition(".")[0]) if part in modules()}


def loaded_through(modules: set[str], packages: set[str], later: bool = True) -> set[str]:
    """Where these modules, or those that they load, import from packages, which do not count."""
    reached, rest = set(), [*modules, "yoco_eval"]
    while rest:
        module = rest.pop()
        if module not in reached:
            reached.add(module)
            rest += loads(module, later=later)
    return {
        f"{module}: {name}"
        for module in reached
        for name in imports(module, types=False, later=later)
        if is_in(name, packages) and not is_in(module, packages)
    }


def is_in(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("room", WITHOUT_CIRCLES)
def test_a_room_has_no_circle(room):
    inside = members(room)
    try:
        graph = {name: loads(name, types=True) & inside - {name} for name in inside}
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_it_may(room):
    allowed = MAY_IMPORT[room] | members(room) | sys.stdlib_module_names | {"_typeshed"}
    wrong = {
        f"{module}: {name}"
        for module in members(room)
        for name in imports(module, types=True)
        if not is_in(name, allowed)
    }
    assert not wrong


@pytest.mark.parametrize("room", NEVER_LOADS)
def test_a_room_does_not_load_through_others(room):
    assert not loaded_through(members(room), NEVER_LOADS[room])


@pytest.mark.parametrize("module", LATER)
def test_a_module_leaves_what_takes_long_to_its_functions(module):
    assert not loaded_through({module}, LATER[module], later=False)
