"""How long the evaluated model takes for a task's requests: it is asked some, and timed.

Any backend of lm-eval can be asked. One that has the following methods is known better; each is as
`YocoLM` has it:

prefill_operations(length): what feeding so many tokens costs, in any unit. Otherwise it is taken
    for a transformer.
longest_context(): the longest text, in tokens, that its memory takes.
agree(own): what the first process of a run of several says; without it, such runs have no plan.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.utils import simple_parse_args_string

from yoco_eval import registration

from .budget import Work, transformer_work
from .evaluated_model import hidden_size

T = TypeVar("T")

_CHANNELS = 4096  # of a model that does not tell them


def work_of(model: LM, metadata: Mapping[str, Any]) -> Work:
    """What feeding so many tokens costs, in a unit of the model's own."""
    own = getattr(model, "prefill_operations", None)
    return own or transformer_work(hidden_size(metadata) or _CHANNELS)


def answer(tasks: Iterable[Task], model: LM) -> None:
    """Has the model answer all requests of tasks, as lm-eval would in this run."""
    options = registration.options
    in_chats = options.get("apply_chat_template") or False
    generation = options.get("gen_kwargs") or {}
    if isinstance(generation, str):
        generation = simple_parse_args_string(generation)
    requests: dict[str, list[Instance]] = {}
    for task in tasks:
        if generation and task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", generation, update=True)
        task.build_all_requests(
            rank=model.rank,
            world_size=model.world_size,
            system_instruction=options.get("system_instruction"),
            apply_chat_template=bool(in_chats),
            fewshot_as_multiturn=options.get("fewshot_as_multiturn", False),
            chat_template=getattr(model, "apply_chat_template", None) if in_chats else None,
            tokenizer_name=getattr(model, "tokenizer_name", "") if in_chats else "",
        )
        for request in task.instances:
            requests.setdefault(request.request_type, []).append(request)
    for kind, asked in requests.items():
        method = getattr(model, kind)
        silent = "disable_tqdm" in inspect.signature(method).parameters
        method(asked, **({"disable_tqdm": True} if silent else {}))
        if model.world_size > 1:
            model.barrier()


def agreed(model: Any, own: T) -> T:
    """What the first process says, where there are several that have an `agree`."""
    return model.agree(own) if hasattr(model, "agree") else own


class Clock:
    """Seconds since the run began; the first process's, where there are several."""

    def __init__(self, model: LM | None) -> None:
        self._model = model

    def now(self) -> float:
        return agreed(self._model, time.monotonic() - registration.began)
