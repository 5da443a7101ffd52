"""Tells lm-eval of this project's backend and tasks wherever `lm_eval` is imported.

lm-eval 0.4.13 finds only the backends and tasks of its own source tree. So a .pth file in
site-packages imports this package when Python starts, which calls `install()`: a finder on
`sys.meta_path` then waits for the modules in which lm-eval lists its backends and its tasks, reads
its command line, makes models and runs its evaluations, and adds ours after each has run.
Later releases read the entry point `lm_eval.models`, and for them only the tasks are added.

This module is imported whenever Python starts, so it imports nothing but `sys` and `time`, which
are there by then. By
`python -X importtime`, on a machine where Python starts in 10 ms, it costs 0.4 ms, its package
included; importing wrapt, which offers post-import hooks ready-made, costs 60 ms there.
"""

import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

# Names of what the user gave with metadata, and with the model's arguments alone. lm-eval mixes
# both, and a task could not tell its settings, and slips in them, from arguments of a backend.
given_metadata: frozenset[str] = frozenset()
given_model_args: frozenset[str] = frozenset()
# While `simple_evaluate` or `evaluate` runs: a list of the model that it evaluates, empty until
# lm-eval has made it. Tasks size their prompts by it.
evaluated: "list[Any] | None" = None
# What that function was told of the run, by name; and when, by `time.monotonic`, the run began: on
# the command line with Python itself.
options: "Mapping[str, Any]" = {}
began = time.monotonic()

# The command line's metadata, in which lm-eval has put the model's arguments, too.
_mixed: object = None


def _note_metadata(module: "Any") -> None:
    """Have the command line's configuration leave the names behind, before it mixes them.

    Of several processes that will be one run of our backend, only one is heard from there on.
    """
    import os
    from functools import wraps

    process = module.EvaluatorConfig._process_arguments
    configure = getattr(module.EvaluatorConfig, "_configure", None)

    if configure is not None:

        @wraps(configure)
        def configure_quietly(config: "Any") -> "Any":
            sizes = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
            if config.model == "yoco" and set(sizes) != {"1"}:
                # Else torch has pages to say, in each process, where the store of one is gone.
                os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
                from yoco_eval.ranks import silence_others

                silence_others()
            return configure(config)

        module.EvaluatorConfig._configure = configure_quietly

    @wraps(process)
    def process_noting(config: "Any") -> "Any":
        global given_metadata, given_model_args, _mixed
        given_metadata = frozenset(config.metadata or {})
        given_model_args = frozenset(config.model_args or {}) - given_metadata
        processed = process(config)
        _mixed = config.metadata
        return processed

    module.EvaluatorConfig._process_arguments = process_noting


def _watch_runs(evaluator: "Any") -> None:
    """Have lm-eval's Python functions leave the model behind, and the names that they are given.

    A backend that has something to say of a run's tasks, or to do with them, is told them first.
    """
    from functools import wraps
    from inspect import signature

    from lm_eval.utils import simple_parse_args_string

    def watched(evaluate: "Callable[..., Any]") -> "Callable[..., Any]":
        parameters = signature(evaluate)

        @wraps(evaluate)
        def evaluate_watched(*args: "Any", **named: "Any") -> "Any":
            global given_metadata, given_model_args, evaluated, options, began
            before = given_metadata, given_model_args, evaluated, options, began
            given = parameters.bind_partial(*args, **named).arguments
            model = given.get("model", given.get("lm"))
            try:
                if evaluated is None:
                    evaluated, options = [], given
                    if given.get("metadata") is not _mixed or _mixed is None:
                        began = time.monotonic()
                        given_metadata, given_model_args = _names(given, simple_parse_args_string)
                if not evaluated and not isinstance(model, str):
                    evaluated.append(model)
                prepare = getattr(given.get("lm"), "prepare", None)
                if prepare is not None:
                    prepare(given.get("task_dict", {}))
                return evaluate(*args, **named)
            finally:
                given_metadata, given_model_args, evaluated, options, began = before

        return evaluate_watched

    evaluator.simple_evaluate = watched(evaluator.simple_evaluate)
    evaluator.evaluate = watched(evaluator.evaluate)


def _names(
    given: "Mapping[str, Any]", parse: "Callable[[str], Mapping[str, Any]]"
) -> tuple[frozenset[str], frozenset[str]]:
    """What `given_metadata` and `given_model_args` are for arguments of `simple_evaluate`."""
    # Of a manager of tasks that is the user's own, lm-eval asks for no other metadata.
    manager = given.get("task_manager")
    metadata = given.get("metadata") if manager is None else getattr(manager, "metadata", None)
    names = frozenset(metadata or {})
    model_args = given.get("model_args") or {}
    arguments = frozenset(parse(model_args) if isinstance(model_args, str) else model_args)
    return names if manager is None else names - arguments, arguments - names


def _note_model(module: "Any") -> None:
    """Have the model that `simple_evaluate` makes of a name be known before it loads the tasks."""
    from functools import wraps

    make = module.LM.__init__

    @wraps(make)
    def make_noting(model: "Any", *args: "Any", **options: "Any") -> None:
        make(model, *args, **options)
        if evaluated is not None and not evaluated:
            evaluated.append(model)

    module.LM.__init__ = make_noting


def _add_backend(models: "Any") -> None:
    """Make `--model yoco` known, as lazily as the built-in backends are."""
    from lm_eval.api import registry

    if hasattr(registry, "import_plugins"):  # this lm-eval reads the entry point by itself
        return
    if "yoco" not in registry.model_registry:
        registry.model_registry.register("yoco", target="yoco_eval.lm:YocoLM")


def _add_tasks(index: "Any") -> None:
    """Have the task index scan `yoco_eval.tasks` wherever it scans the built-in tasks."""
    from functools import wraps
    from importlib.util import find_spec
    from pathlib import Path

    built_in = Path(index.__file__).parent
    spec = find_spec("yoco_eval.tasks")
    assert spec is not None and spec.submodule_search_locations
    ours = Path(spec.submodule_search_locations[0])
    build = index.TaskIndex.build

    @wraps(build)
    def build_with_ours(paths: "Any", *args: "Any", **kwargs: "Any") -> "Any":
        paths = list(paths)
        if built_in in paths and ours not in paths:
            paths.insert(paths.index(built_in) + 1, ours)
        return build(paths, *args, **kwargs)

    index.TaskIndex.build = staticmethod(build_with_ours)


_HOOKS = {
    "lm_eval.models": _add_backend,
    "lm_eval.tasks._index": _add_tasks,
    "lm_eval.config.evaluate_config": _note_metadata,
    "lm_eval.evaluator": _watch_runs,
    "lm_eval.api.model": _note_model,
}


def _run_hook(module: "ModuleType") -> None:
    try:
        _HOOKS[module.__name__](module)
    except Exception as error:  # whatever is wrong here, lm-eval itself must go on working
        import logging

        logging.getLogger(__name__).warning(
            "yoco-eval could not add itself to %s (%r): reinstall yoco-eval, or an lm-eval that "
            "it was tested with",
            module.__name__,
            error,
        )


class _Loader:
    """Stands in for a module's own loader until the module has run, then calls the hook."""

    def __init__(self, loader: "Any") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)

    def exec_module(self, module: "Any") -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _run_hook(module)


class _Finder:
    """Finds the hooked modules through the finders after it, and nothing else."""

    @classmethod
    def find_spec(
        cls, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name not in _HOOKS:
            return None
        for finder in sys.meta_path[sys.meta_path.index(cls) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                # A loader in all but its base class, the import of which takes time.
                spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


def install() -> None:
    """Start waiting for lm-eval; what it has already imported is extended at once."""
    if _Finder in sys.meta_path:
        return
    sys.meta_path.insert(0, _Finder)
    for name in _HOOKS:
        if name in sys.modules:
            _run_hook(sys.modules[name])
