"""Members of groups, made from their files: lm-eval's own with settings and classes of ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import TaskIndex

Member: TypeAlias = Task | Group
_OF_A_FILE = {"version", "config_source"}  # what the metadata say of the file that they stand in


def load_members(
    folders: Iterable[str | Path], members: Iterable[Mapping[str, Any]], metadata: Mapping[str, Any]
) -> Iterator[Member]:
    """Makes tasks and groups one after the other.

    Args:
        folders: where their files are, in lm-eval's `tasks` folder unless the path is absolute.
        members: of each its `name`, and what takes the place of keys in its file.
        metadata: of the group that asks for them, from which they take the user's settings.
    """
    # lm-eval does not hand its index over, and making one of all its folders takes seconds.
    tasks = Path(lm_eval.tasks.__file__).parent
    index = TaskIndex.build([tasks / folder for folder in folders])
    factory = TaskFactory(meta={k: v for k, v in metadata.items() if k not in _OF_A_FILE})
    for member in members:
        overrides = dict(member)
        yield factory.build(index[overrides.pop("name")], overrides=overrides, registry=index)
