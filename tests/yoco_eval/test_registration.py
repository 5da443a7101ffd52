"""Installs the package, as a wheel and editable, and asks lm-eval in fresh interpreters."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # wheels are built

ROOT = Path(__file__).parents[2]
LM_EVAL = Path(find_spec("lm_eval").origin).parent
PTH = ROOT / "yoco_eval" / "yoco_eval_registration.pth"


def run(*command, **environ):
    """Run a command in an otherwise empty environment; return (stdout, stderr)."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd="/", env=environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def pip(python, *arguments):
    run(sys.executable, "-m", "pip", "--python", python, *arguments)


def files(folder):
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


class Environment:
    """A virtual environment with this project built from a copy of its sources.

    Dependencies are taken from the environment that runs the tests, lm-eval without its tasks
    (but hellaswag), whose thousands of files take many seconds to read.
    """

    def __init__(self, folder, kind):
        source = folder / "source"
        needless = [".venv", ".git", ".*cache", "__pycache__", "build", "results", "tests"]
        shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*needless))
        self.venv = folder / "venv"
        venv.create(self.venv)
        self.before = files(self.venv)
        self.python = self.venv / "bin" / "python"
        script = f"import os; os.chdir({str(source)!r}); import setuptools.build_meta as build; "
        script += f"build.build_{kind}({str(folder)!r})"
        run(sys.executable, "-c", script)
        pip(self.python, "install", "--no-index", "--no-deps", next(folder.glob("*.whl")))

        self.lm_eval = folder / "lm_eval"
        tasks = LM_EVAL / "tasks"
        shutil.copytree(
            LM_EVAL,
            self.lm_eval,
            ignore=lambda path, names: [
                name
                for name in names
                if Path(path) == tasks and (tasks / name).is_dir() and name != "hellaswag"
            ],
        )
        self.path = f"{folder}:{sysconfig.get_path('purelib')}"

    @property
    def site_packages(self):
        return next(self.venv.glob("lib/python*/site-packages"))

    def run(self, *arguments):
        """Run Python with `arguments`; return (stdout, stderr)."""
        return run(self.python, *arguments, PYTHONPATH=self.path)

    def evaluate(self, script):
        """Run `script`, which prints JSON at the end; return the value."""
        return json.loads(self.run("-c", script)[0])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("editable"), "editable")


@pytest.fixture(params=["wheel", "editable"])
def environment(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_uninstall_leaves_nothing(tmp_path, kind):
    environment = Environment(tmp_path, kind)
    installed = files(environment.venv) - environment.before
    assert {PTH.name, "yoco-eval"} <= {path.name for path in installed}
    pip(environment.python, "uninstall", "--yes", "yoco-eval")
    assert files(environment.venv) <= environment.before


@pytest.mark.parametrize("part", ["kernels", "model", "reports", "tasks"])
def test_package_has_its_code_and_data(environment, part):
    def needed(folder):
        patterns = ["*.py", "*.yaml", "*.json", "html/*", "checkpoints/**/*"]
        return {
            str(path.relative_to(folder))
            for pattern in patterns
            for path in folder.rglob(pattern)
            if path.is_file() and "__pycache__" not in path.parts
        }

    script = "from importlib.util import find_spec; "
    script += f"print(find_spec('yoco_eval.{part}').submodule_search_locations[0])"
    installed = Path(environment.run("-c", script)[0].strip())
    assert needed(installed) == needed(ROOT / part)


def test_type_checkers_and_editors_find_every_module(environment):
    """They look for files below the entries of the path, and run no import hook."""
    path = environment.evaluate("import json, sys; print(json.dumps(sys.path[1:]))")
    [package] = (Path(entry, "yoco_eval") for entry in path if Path(entry, "yoco_eval").exists())
    modules = "cli.py", "kernels/norm.py", "model/cache.py", "reports/runs.py", "tasks/needle.py"
    assert [name for name in (*modules, "py.typed") if not (package / name).is_file()] == []


@pytest.mark.parametrize(
    "command", [[Path(sysconfig.get_path("scripts")) / "lm_eval"], ["-m", "lm_eval"]]
)
def test_commands_list_our_tasks(environment, command):
    listing = environment.run(*command, "ls", "tasks")[0]
    assert "|yoco_needle" in listing
    assert "|hellaswag" in listing


def test_backend_is_known_and_lazy(environment):
    assert environment.evaluate("""
import json, sys
from lm_eval.api.registry import get_model, model_registry
built_in = get_model("dummy").__name__
placeholder = dict(model_registry.items())["yoco"]
imported = "yoco_eval.lm" in sys.modules
print(json.dumps([built_in, placeholder, imported, get_model("yoco").__name__]))
""") == ["DummyLM", "yoco_eval.lm:YocoLM", False, "YocoLM"]


def test_tasks_count_as_built_in(wheel, tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\noutput_type: generate_until\n")
    assert wheel.evaluate(f"""
import json
from lm_eval.tasks import TaskManager
wanted = ("hellaswag", "yoco_needle", "mine")
managers = [
    TaskManager(),
    TaskManager(include_path={str(tmp_path)!r}),
    TaskManager(include_path=[{str(tmp_path)!r}], include_defaults=False),
]
print(json.dumps([[name for name in wanted if name in m.all_tasks] for m in managers]))
""") == [["hellaswag", "yoco_needle"], ["hellaswag", "yoco_needle", "mine"], ["mine"]]


def test_survives_reload_and_other_finders(wheel):
    assert wheel.evaluate("""
import importlib, importlib.util, json, sys

class Delegating:
    "A finder that, like wrapt's, asks all of sys.meta_path again and wraps what it finds."
    busy, seen = False, []

    def __init__(self, label):
        self.label = label

    def find_spec(self, name, path=None, target=None):
        if self.busy or not name.startswith("lm_eval"):
            return None
        self.busy = True
        try:
            self.seen.append([self.label, name])
            return importlib.util.find_spec(name)
        finally:
            self.busy = False

sys.meta_path.insert(0, Delegating("before"))
sys.meta_path.insert(2, Delegating("after"))
sys.meta_path.append(type("OldFinder", (), {"find_module": lambda *names: None}))
import lm_eval.models, lm_eval.tasks._index
importlib.reload(lm_eval.models)
importlib.reload(lm_eval.tasks._index)
from lm_eval.tasks import TaskManager
print(json.dumps([
    ["before", "lm_eval.models"] in Delegating.seen,
    ["after", "lm_eval.models"] in Delegating.seen,
    "yoco" in lm_eval.api.registry.model_registry,
    "yoco_needle" in TaskManager().all_tasks,
    type(lm_eval.models.__loader__).__name__,
    type(lm_eval.models.__spec__.loader).__name__,
]))""") == [True, True, True, True, "SourceFileLoader", "SourceFileLoader"]


def test_importing_the_package_registers_where_no_pth_file_is_read(wheel):
    """As after `pip install --target`, and also if lm-eval has been imported before."""
    # -S: no .pth file is read, and the package is found through the path alone.
    path = f"{wheel.path}:{wheel.site_packages}"
    out = run(
        wheel.python,
        "-S",
        "-c",
        """
import lm_eval.models, lm_eval.tasks
from lm_eval.api.registry import model_registry
before = "yoco" in model_registry
import yoco_eval
print(before, "yoco" in model_registry, "yoco_needle" in lm_eval.tasks.TaskManager().all_tasks)
""",
        PYTHONPATH=path,
    )[0]
    assert out.split() == ["False", "True", "True"]


def test_later_lm_eval_reads_the_entry_point(wheel, tmp_path):
    for name, text in {
        "__init__": "",
        "models": "import lm_eval.api.registry",
        "api/__init__": "",
        "api/registry": "model_registry = {}\ndef import_plugins(modules): pass",
    }.items():
        module = tmp_path / "lm_eval" / f"{name}.py"
        module.parent.mkdir(exist_ok=True)
        module.write_text(text)
    out = run(
        wheel.python,
        "-c",
        """
import lm_eval.models
from importlib.metadata import entry_points
print(lm_eval.api.registry.model_registry, *entry_points(group="lm_eval.models"))
""",
        PYTHONPATH=tmp_path,
    )
    assert out == (
        "{} EntryPoint(name='yoco', value='yoco_eval.lm:YocoLM', group='lm_eval.models')\n",
        "",
    )


def test_backend_loads_from_an_entry_point():
    """As a later lm-eval registers it: loading the class must not register it once more."""
    code = (
        "from importlib.metadata import EntryPoint\n"
        "from lm_eval.api.registry import model_registry\n"
        "point = EntryPoint('yoco', 'yoco_eval.lm:YocoLM', 'lm_eval.models')\n"
        "model_registry.register('yoco', target=point)\n"
        "print(model_registry.get('yoco').__name__)"
    )
    assert run(sys.executable, "-c", code)[0] == "YocoLM\n"


def test_a_changed_lm_eval_still_works(wheel, tmp_path):
    (tmp_path / "lm_eval" / "tasks").mkdir(parents=True)
    (tmp_path / "lm_eval" / "tasks" / "_index.py").write_text("works = True")
    out, err = run(
        wheel.python,
        "-c",
        "import lm_eval.tasks._index as index; print(index.works)",
        PYTHONPATH=tmp_path,
    )
    assert out == "True\n"
    assert err.startswith("yoco-eval could not add itself to lm_eval.tasks._index")
    assert err.count("\n") == 1


def test_start_of_python_imports_nothing_more(environment):
    loaded = environment.run("-c", "import sys; print(*sys.modules)")[0].split()
    ours = [name for name in loaded if name.startswith("yoco_eval")]
    assert sorted(ours) == ["yoco_eval", "yoco_eval.registration"]
    assert not {"lm_eval", "torch", "transformers", "triton", "wrapt"} & set(loaded)


def test_registration_imports_nothing_by_itself(wheel):
    script = "import sys; before = set(sys.modules); import yoco_eval.registration; "
    script += "print(*sorted(set(sys.modules) - before))"
    out = run(wheel.python, "-S", "-c", script, PYTHONPATH=wheel.site_packages)[0]
    assert out.split() == ["yoco_eval", "yoco_eval.registration"]


@pytest.mark.parametrize(
    "package",
    [
        {},
        {"yoco_eval/left_over.txt": ""},
        {"yoco_eval/__init__.py": "", "yoco_eval/registration.py": "raise RuntimeError"},
        {"yoco_eval/__init__.py": "this is not Python"},
    ],
)
def test_a_damaged_installation_does_not_disturb_python(tmp_path, package):
    shutil.copy(PTH, tmp_path)
    for name, text in package.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    script = f"import site; site.addsitedir({str(tmp_path)!r}); print('ready')"
    assert run(sys.executable, "-S", "-c", script) == ("ready\n", "")
