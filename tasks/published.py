"""Published results of the tasks, to show beside measured ones."""

import json
from importlib.resources import files


def published_rows() -> list[dict]:
    """What others reported, a row for each model and table.

    Each row has `model`; `source`, the publication and its table; `scores`, as lm-eval's results
    are keyed: {task: {metric: value}}, without what was not reported. Where it matters, it has
    `training_tokens` (of the checkpoint) and `context_length` (of the prompts), both in tokens;
    and `differs`, what was evaluated where that is another benchmark of the same kind.
    """
    return json.loads(files(__package__).joinpath("published.json").read_text(encoding="utf-8"))
