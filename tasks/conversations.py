"""What the MRCR tasks share: a long conversation, one text of it asked for, the published grade.

OpenAI's MRCR (multi-round co-reference resolution, data set openai/mrcr) asks for the same piece of
writing several times, has each request answered differently, and has the model repeat the i-th of
these answers behind a random string. The documents say what is asked; the conversations, up to
megabytes each, stay beside them.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from .evaluated_model import max_positions, token_counter
from .generated import BUDGETS, context_text
from .long_context import LongContextGroup, LongContextTask
from .members import Member, load_members
from .settings import listed, read_settings, whole

logger = logging.getLogger(__name__)

NEEDLES = (2, 4, 8)
DOUBLED = 2  # how many times the tokens of the right answer a model may write

Message = Mapping[str, str]  # its `role`, "system", "user" or "assistant", and its `content`


def grade(response: str, answer: str, random_string: str) -> float:
    """OpenAI's: how alike the two are behind the string, 0 to 1; 0 if the response lacks it.

    How alike is `difflib`'s ratio: twice the characters that match, by the characters of both.
    """
    if not response.startswith(random_string):
        return 0.0
    said, right = (text.removeprefix(random_string) for text in (response, answer))
    return SequenceMatcher(None, said, right).ratio()


def transcript(messages: Iterable[Message]) -> str:
    """A conversation as plain text, for models without a chat template.

    Each message stands behind its role, "User: " or "Assistant: " (a system's by itself), with an
    empty line between them; the last line is "Assistant:".
    """
    names = {"user": "User: ", "assistant": "Assistant: "}
    turns = [names.get(one["role"], "") + one["content"] for one in messages]
    return "\n\n".join([*turns, "Assistant:"])


def needle_counts(name: str, value: Any) -> list[int]:
    """Those of `NEEDLES` that are asked for, ascending, without repetitions."""
    counts = sorted({whole(name, item) for item in listed(name, value)})
    for count in counts:
        if count not in NEEDLES:
            raise ValueError(f"{name}: MRCR has no {count}; it has {', '.join(map(str, NEEDLES))}")
    return counts


class ConversationTask(LongContextTask):
    """A task with one number of needles, which its YAML file tells as `needles`.

    Each of its documents has `answer`; `random_string`, which the answer begins with;
    `answer_tokens`; `prompt_tokens`, in all that the model gets, special tokens included; and
    `max_gen_toks`, the room that an answer has.

    Attributes:
        needles: requests that are alike, one of whose answers is asked for.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        config = dict(config)
        self.needles: int = config.pop("needles")
        metadata = config.get("metadata") or {}
        chosen = read_settings(self.Settings, metadata).needles
        if self.needles not in chosen:
            raise ValueError(
                f"needles: {config['task']} has {self.needles}, not {', '.join(map(str, chosen))}; "
                "evaluate the task with that number in its name"
            )
        self._wrapping: dict[str, Any] = {}
        super().__init__(config)
        self.config.metadata["needles"] = self.needles
        self._ends_in_transcripts = self.config.generation_kwargs["until"]

    @abstractmethod
    def messages(self, doc: Mapping[str, Any]) -> Sequence[Message]:
        """The conversation of a document, the user's question last."""

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        self._counter = token_counter(self.config.metadata)
        super().download(dataset_kwargs)

    def input(self, doc: Mapping[str, Any]) -> str:
        return transcript(self.messages(doc))

    def doc_to_text(self, doc: Mapping[str, Any], doc_to_text: Any = None) -> str:
        return self.input(doc)

    def doc_to_prefix(self, doc: Mapping[str, Any]) -> None:
        return None

    def fewshot_context(
        self,
        doc: Mapping[str, Any],
        num_fewshot: int = 0,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        chat_template: Callable | None = None,
        gen_prefix: str | None = None,
    ) -> Any:
        """What the model gets: each message a turn of the chat template, or else a transcript."""
        template = chat_template if apply_chat_template else None
        return self._render(self.messages(doc), system_instruction, template)

    def build_all_requests(self, **options: Any) -> None:
        """As lm-eval's; a system instruction and a chat template count as tokens of the prompts."""
        in_chats = options.get("apply_chat_template", False)
        self._wrapping = {
            "system_instruction": options.get("system_instruction"),
            "chat_template": options.get("chat_template") if in_chats else None,
        }
        if "until" not in self.generation_given:
            until = [] if in_chats else self._ends_in_transcripts
            self.config.generation_kwargs = {**self.config.generation_kwargs, "until": until}
        # Both come after loading.
        if any(self._wrapping.values()) or self.budget_given:
            self.download()
        super().build_all_requests(**options)

    def construct_requests(self, doc: Mapping[str, Any], ctx: Any, **options: Any) -> Instance:
        """lm-eval's request, with the document's own room for an answer."""
        request = super().construct_requests(doc, ctx, **options)
        context, settings = request.arguments
        if not self.budget_given or self._answer_tokens() != doc["max_gen_toks"]:
            settings = {name: value for name, value in settings.items() if name not in BUDGETS}
            request.arguments = context, settings | {"max_gen_toks": doc["max_gen_toks"]}
        return request

    def score(self, doc: Mapping[str, Any], results: Sequence[str]) -> float:
        """The published grade of what is said after the thinking; blanks before it do not count."""
        return grade(results[0].lstrip(), doc["answer"], doc["random_string"])

    def tokens(self, messages: Sequence[Message]) -> int:
        """The tokens of all that the model gets of a conversation, special ones included."""
        context = self._render(messages, **self._wrapping)
        return self._counter.count(context_text(context)) + self._counter.special

    def _render(
        self,
        messages: Sequence[Message],
        system_instruction: str | None = None,
        chat_template: Callable | None = None,
    ) -> Any:
        turns = [dict(message) for message in messages]
        if system_instruction:
            turns.insert(0, {"role": "system", "content": system_instruction})
        if chat_template is None:
            return transcript(turns)
        try:
            return chat_template(turns, add_generation_prompt=True)
        except Exception:  # templates raise whatever they do where a role comes twice in a row
            joined = _joined(turns)
            if len(joined) == len(turns):
                raise
            return chat_template(joined, add_generation_prompt=True)

    def room(self, prompt_tokens: int, most: int) -> int:
        """The tokens that an answer may have: `most`, or what the model's positions leave."""
        positions = max_positions(self.config.metadata)
        return most if positions is None else min(most, positions - prompt_tokens)


def _joined(turns: Sequence[Message]) -> list[dict[str, str]]:
    """The turns, those of one role in a row as one, with an empty line between their texts."""
    joined: list[dict[str, str]] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"]:
            joined[-1]["content"] += f"\n\n{turn['content']}"
        else:
            joined.append(dict(turn))
    return joined


class ConversationGroup(LongContextGroup):
    """The mean over the numbers of needles that are asked for, each a task of its own."""

    def tasks(self, config: Mapping[str, Any]) -> Iterable[Member]:
        name, metadata = config["task"], config["metadata"]
        chosen = read_settings(self.Task.Settings, metadata).needles
        members = [{"name": f"{name}_{needles}"} for needles in chosen]
        return load_members([Path(__file__).parent], members, metadata)
