"""One model by itself: tables with a column for each task, and how it was evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from yoco_eval.printable import VALUE, listed, shortened

from .cells import NOTHING, Cell, Table
from .models import CACHE
from .setups import OF_TASKS, setup
from .task_runs import TaskRun

# Of what a task was run with, what a reader would ask about; first what makes other predictions.
_ASKED = (
    *CACHE, "dtype", "lm-eval", "max_length", "tokenizer", "chat template", "system instruction",
    "limit", *(name for name in OF_TASKS if name != "context lengths"),  # which tables show
)  # fmt: skip
_TASKS = 6  # that are named


def beside(title: str, tables: Mapping[str, Table]) -> Table:
    """Tables by task, each of one model's figures by context length, as one.

    Rows are the lengths of any; notes stand once.
    """
    found: dict[float, tuple[Cell, dict[str, Cell]]] = {}
    for task, table in tables.items():
        for label, cell in table.rows:
            assert label.value is not None  # the length in tokens
            found.setdefault(label.value, (label, {}))[1][task] = cell
    rows = tuple(
        (label, *(cells.get(task, Cell(NOTHING)) for task in tables))
        for _, (label, cells) in sorted(found.items())
    )
    feet = [table.foot for table in tables.values()]
    foot: tuple[Cell, ...] = ()
    if any(feet):
        label = next(one[0] for one in feet if one)
        foot = (label, *(one[1] if one else Cell(NOTHING) for one in feet))
    notes = dict.fromkeys(note for table in tables.values() for note in table.notes)
    return Table(title, ("context", *tables), rows, foot, notes=tuple(notes))


def downwards(table: Table, corner: str) -> Table:
    """Benchmarks as rows; the model and the published ones, if there are any, as columns."""
    columns = (*table.rows, *table.apart)
    labels = [label.replace("\n", ", ") for label in table.header]
    rows = tuple(
        (Cell(label), *(column[place] for column in columns))
        for place, label in enumerate(labels)
        if place
    )
    title = f"{table.title}; {table.apart_title}: the others" if table.apart else table.title
    header = (corner, *(column[0].text for column in columns))
    return Table(title, header, rows, notes=table.notes)


def evaluated(runs: Sequence[TaskRun]) -> Iterator[str]:
    """How the tasks were run: each setting with its value, and of which tasks that is.

    A group stands for its members where they are alike.
    """
    groups = {run.task: members for run in runs if (members := _members(run, runs))}
    tasks = {run.task: setup(run) for run in runs if run.task not in groups}
    for name in _ASKED:
        values: dict[str, list[str]] = {}
        for task, settings in tasks.items():
            if name in settings:
                values.setdefault(settings[name], []).append(task)
        for value, of in values.items():
            where = "" if len(of) == len(tasks) else f" ({listed(_folded(of, groups), _TASKS)})"
            yield f"{name}: {shortened(value, VALUE)}{where}"


def _members(group: TaskRun, runs: Sequence[TaskRun]) -> set[str]:
    """The tasks of a group, if all are there themselves, with results of the same files."""
    leaves = set(group.leaves(group.file)) if group.members else set()
    alike = {run.task for run in runs if run.files == group.files and not run.members}
    return leaves if leaves <= alike else set()


def _folded(tasks: Sequence[str], groups: Mapping[str, set[str]]) -> list[str]:
    """The tasks, groups in the place of all their members."""
    names = dict.fromkeys(tasks)
    for group, members in sorted(groups.items(), key=lambda one: -len(one[1])):
        if members <= names.keys():
            names = dict.fromkeys(group if name in members else name for name in names)
    return list(names)
