"""What tasks of generated answers share: their budget, which is the user's, and room to think."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs

logger = logging.getLogger(__name__)

BUDGETS = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}  # to lm-eval


def context_text(context: Any) -> str:
    """A prompt as text, if need be with the markup that a server will put around its turns."""
    if isinstance(context, str):
        return context
    # lm-eval hands servers a chat as JSON, or as it is. Their templates take hardly more tokens.
    turns = context if isinstance(context, list) else json.loads(context.prompt)
    return "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in turns)


class GeneratedTask(ConfigurableTask):
    """lm-eval's task, for which --gen_kwargs give a budget by any of its names.

    Attributes:
        generation_given: the names in --gen_kwargs.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.generation_given: set[str] = set()
        super().__init__(config=config)

    def set_config(self, key: str, value: Any, update: bool = False) -> None:
        """As lm-eval's, which hands over --gen_kwargs so; a budget by any name is the only one."""
        if key == "generation_kwargs":
            self.generation_given |= set(value)
            if update and BUDGETS & set(value):
                bare = {k: v for k, v in self.config.generation_kwargs.items() if k not in BUDGETS}
                super().set_config(key, bare)
        super().set_config(key, value, update)

    @property
    def budget_given(self) -> bool:
        """Whether --gen_kwargs say how many tokens an answer has."""
        return bool(self.generation_given & BUDGETS)

    def _answer_tokens(self) -> int:
        """The generation budget, under whichever of its names lm-eval knows."""
        return normalize_gen_kwargs(self.config.generation_kwargs)["max_gen_toks"]

    def _thinks(self, chat_template: Callable | None) -> bool:
        """Whether the turns of the model that has this template begin with thoughts.

        A warning tells of a budget that was not made for them.
        """
        model = getattr(chat_template, "__self__", None)
        if getattr(model, "think_end_token", None) is None:
            return False
        if not self.budget_given:
            logger.warning(
                "%s: a model that thinks needs room for it; give --gen_kwargs max_gen_toks=4096, "
                "or more", self.config.task,
            )  # fmt: skip
        return True
