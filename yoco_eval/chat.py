"""Chats to texts by the template of a tokenizer: bounded in work, with markers that are tokens."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from types import FrameType
from typing import Any

import psutil
from transformers import PreTrainedTokenizerBase

from .tokenizers import first_line

logger = logging.getLogger(__name__)

# Steps that a template may take. Compiling one takes some 10 a character, running it some tens a
# message. Not a time, so that what one machine renders every machine does.
_STEPS, _STEPS_A_CHARACTER, _STEPS_A_MESSAGE = 200_000, 30, 3_000
_BYTES = 1 << 28  # of memory that it may take beyond what there is
_limiting = Lock()  # the limit is the process's: a thread must not take another's for its own
# What is hardly ever meant as plain text: <|im_start|>; Gemma's <|turn> and <turn|>.
_MARKER = re.compile(r"<\|[^<>|\s]+\|?>|<[^<>|\s]+\|>")
_OWN = {"add_generation_prompt", "continue_final_message", "conversation", "messages", "tokenize"}


class ChatTemplate:
    """Renders chats as the tokenizer's template has them.

    Args:
        tokenizer: with its template, which is read at each use.
        variables: of the template, beside the chat's own, such as `enable_thinking`.

    Raises:
        ValueError: one of the variables is the chat's own.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._variables = dict(variables or {})
        if own := _OWN & set(self._variables):
            raise ValueError(
                f"{', '.join(sorted(own))}: no variable that a chat template can be given, as each "
                "request has its own; leave it out"
            )
        self._checked: set[Any] = set()

    def render(self, chat: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a chat; without a generation prompt, its last message is to be continued.

        Raises:
            ValueError: there is no template, it fails, it does not come to an end, or the tokenizer
                splits the markers that it writes into plain text.
        """
        form = (tuple(message.get("role") for message in chat), add_generation_prompt)
        if form not in self._checked:
            self._check_markers(
                self._render([{**m, "content": "Oslo"} for m in chat], add_generation_prompt)
            )
            self._checked.add(form)
        return self._render(chat, add_generation_prompt)

    def _render(self, chat: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        name, template = self._tokenizer.name_or_path, self._tokenizer.chat_template
        if template is None:
            raise ValueError(
                f"{name}: this tokenizer has no chat template; leave out --apply_chat_template"
            )
        steps = _STEPS + _STEPS_A_CHARACTER * len(str(template)) + _STEPS_A_MESSAGE * len(chat)
        try:
            with _memory_bounded(_BYTES), _steps_bounded(steps):
                return self._tokenizer.apply_chat_template(
                    chat,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                    **self._variables,
                )
        except Exception as error:  # a template raises whatever its author's slips lead to
            raise ValueError(
                f"{name}: its chat template fails ({first_line(error)}); mend it, or leave out "
                "--apply_chat_template"
            ) from error

    def _check_markers(self, text: str) -> None:
        """Checks that the markers in a text, of which no part is anybody's words, are tokens."""
        tokenizer = self._tokenizer
        special = (token for token in tokenizer.all_special_tokens if token in text)
        split = [
            marker
            for marker in dict.fromkeys([*_MARKER.findall(text), *special])
            if len(tokenizer(marker, add_special_tokens=False).input_ids) != 1
        ]
        if not split:
            return
        markers = ", ".join(split)
        if tokenizer.split_special_tokens:
            raise ValueError(
                f"{tokenizer.name_or_path}: its chat template writes {markers}, which this "
                "tokenizer splits into plain text; if the model was trained so, set "
                "split_special_tokens to false in tokenizer_config.json, else give a tokenizer "
                "that has them as tokens, or leave out --apply_chat_template"
            )
        logger.warning(
            "%s: its chat template writes %s, which are no tokens of this tokenizer: the model "
            "reads them as plain text", tokenizer.name_or_path, markers,
        )  # fmt: skip


@contextmanager
def _steps_bounded(steps: int) -> Iterator[None]:
    """Lets what runs inside take so many lines of a template and calls of any code, then fails."""
    left = steps

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError(f"it is not done after {steps} steps, so it may never be")
        return trace if frame.f_code.co_filename == "<template>" else None  # as Jinja names them

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _memory_bounded(room: int) -> Iterator[None]:
    """Lets what runs inside take so many bytes more, then has it fail with a MemoryError."""
    if not hasattr(psutil, "RLIMIT_AS"):  # not every system has it
        yield
        return
    process = psutil.Process()
    with _limiting:
        soft, hard = process.rlimit(psutil.RLIMIT_AS)
        limit = process.memory_info().vms + room
        if soft != psutil.RLIM_INFINITY:
            limit = min(limit, soft)
        process.rlimit(psutil.RLIMIT_AS, (limit, hard))
        try:
            yield
        finally:
            process.rlimit(psutil.RLIMIT_AS, (soft, hard))
