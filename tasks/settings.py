"""What a user sets of a task through lm-eval's metadata: read, checked, with defaults."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, field, fields
from difflib import get_close_matches
from functools import cache
from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Any, TypeVar

from yoco_eval import registration
from yoco_eval.lengths import parse_length

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings", bound="DataclassInstance")

# What it means for comparing two runs of a task that they differ in a setting: they asked other
# questions, and are not compared; they are, but not prompt by prompt, or on what is common to both;
# or it is told, as it may explain other scores.
REFUSED, MARKED, STATED = "refused", "marked", "stated"
# All settings of all tasks. The tasks of a run share one --metadata, so that each must know the
# others' names to tell them from slips.
SETTINGS = {
    "haystack": REFUSED,
    "needles": REFUSED,
    "protocol": REFUSED,
    "data": REFUSED,
    "ask_all": STATED,
    "samples": MARKED,
    "depths": MARKED,
    "context_lengths": MARKED,
    "seed": MARKED,
    "minutes": STATED,
}
NAMES = frozenset({*SETTINGS, "max_seq_lengths"})  # which stands for context_lengths
# Which model is evaluated and how its tokens are counted: read by `evaluated_model` and lm-eval.
_OF_THE_MODEL = frozenset(
    "model pretrained tokenizer revision subfolder trust_remote_code add_bos_token max_length "
    "max_model_len".split()
)


_MOST = 100_000  # of whatever is counted: more would not be evaluated in a lifetime


def setting(read: Callable[[str, Any], Any], default: Any) -> Any:
    """A field of a settings dataclass; `read` takes its name and what the user gave."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"read": read})
    return field(default=default, metadata={"read": read})


def read_settings(kind: type[Settings], metadata: Mapping[str, Any]) -> Settings:
    """An object of the dataclass `kind`, whose fields `setting` made, from a task's metadata.

    `max_seq_lengths`, the name that lm-eval's own long-context tasks use, may stand for
    `context_lengths`.

    Raises:
        ValueError: a setting is not what it should be; or a key is no setting of any task.
    """
    own = [f.name for f in fields(kind)]
    _refuse_unknown(own, metadata)
    # What came with --model_args alone is the backend's: `seed` is an argument of some.
    of_the_backend = NAMES & registration.given_model_args
    metadata = {key: value for key, value in metadata.items() if key not in of_the_backend}
    for key in sorted(NAMES.intersection(metadata) - set(own) - {"max_seq_lengths"}):
        _tell_ignored(key, ", ".join(sorted(own)))
    given = {name: metadata[name] for name in own if metadata.get(name) is not None}
    named = {name: name for name in own}
    if "context_lengths" in own and metadata.get("max_seq_lengths") is not None:
        if "context_lengths" in given:
            raise ValueError(
                "context_lengths and max_seq_lengths are both given; they are two names of one "
                "setting, leave one out"
            )
        given["context_lengths"] = metadata["max_seq_lengths"]
        named["context_lengths"] = "max_seq_lengths"
    readers = {f.name: f.metadata["read"] for f in fields(kind)}
    return kind(**{name: readers[name](named[name], value) for name, value in given.items()})


def told(metadata: Mapping[str, Any], settings: DataclassInstance) -> dict[str, Any]:
    """For the results file: a task's metadata with its settings, without those of other tasks."""
    return {k: v for k, v in metadata.items() if k not in NAMES} | asdict(settings)


def _refuse_unknown(own: Sequence[str], metadata: Mapping[str, Any]) -> None:
    known = NAMES.union(_OF_THE_MODEL, own)
    for key in sorted(metadata.keys() - known - registration.given_model_args):
        # What did not come from the command line may be any backend's argument: only what looks
        # like a slip is taken for one.
        if close := get_close_matches(key, NAMES, n=1, cutoff=0.85):
            raise ValueError(f"metadata {key!r} is unknown; did you mean {close[0]!r}?")
        if key in registration.given_metadata:
            own_names = ", ".join(sorted(own))
            raise ValueError(f"metadata {key!r} is unknown; this task's settings are {own_names}")


@cache  # once, however many tasks ignore it
def _tell_ignored(key: str, own: str) -> None:
    logger.warning("metadata %r is ignored by a task whose settings are %s", key, own)


def lengths(name: str, value: Any) -> list[int]:
    """Numbers of tokens, ascending, without repetitions; "64k" is 65536."""
    items = listed(name, value)
    try:
        return sorted({parse_length(item) for item in items})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def depths(name: str, value: Any) -> list[float]:
    """Shares from 0 to 1, ascending; a whole number asks for so many, evenly spaced."""
    if isinstance(value, str) and any(mark in value for mark in "[,"):
        value = listed(name, value)
    elif not isinstance(value, list | tuple):
        given = number(name, value)
        if isinstance(given, int):
            return evenly_spaced(_within(f"{name}: a count of", given))
        value = [given]
    shares = sorted({float(number(name, share)) for share in listed(name, value)})
    for share in shares:
        if not 0 <= share <= 1:
            raise ValueError(
                f"{name}: {share:g} is not within 0 and 1; give a count, such as 5, or shares of "
                "the haystack, such as [0, 0.5, 1]"
            )
    return shares


def whole(name: str, value: Any) -> int:
    given = number(name, value)
    if not isinstance(given, int):
        raise ValueError(f"{name}: {short_repr(value)} is not a whole number; give one, such as 3")
    return given


def count(name: str, value: Any) -> int:
    """A whole number, 1 or more."""
    return _within(f"{name}:", whole(name, value))


def counts(name: str, value: Any) -> int | dict[int, int]:
    """A whole number, 1 or more; or such numbers by context length."""
    if not isinstance(value, Mapping):
        return count(name, value)
    found: dict[int, int] = {}
    for written, number in value.items():
        try:
            length = parse_length(written)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if length in found:
            raise ValueError(f"{name}: {length} has two numbers; give one")
        found[length] = count(name, number)
    return found


def samples_at(samples: int | Mapping[int, int], context_length: int) -> int:
    """The samples of a context length, where `counts` read how many there are.

    Raises:
        ValueError: they are told by context length, and not of this one.
    """
    if isinstance(samples, int):
        return samples
    if context_length not in samples:
        raise ValueError(
            f"samples: there is no number for the context length {context_length}; give one, or "
            "one number for all"
        )
    return samples[context_length]


def _within(what: str, given: int) -> int:
    """The count, which is one that can be worked on."""
    if given < 1:
        raise ValueError(f"{what} {short_repr(given)} is below 1; give 1 or more")
    if given > _MOST:
        raise ValueError(f"{what} {short_repr(given)} is above {_MOST}; give fewer")
    return given


def flag(name: str, value: Any) -> bool:
    truths = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in truths:
        raise ValueError(f"{name}: {short_repr(value)} is neither true nor false")
    return truths[str(value).lower()]


def text(name: str, value: Any) -> str:
    return str(value)


def number(name: str, value: Any) -> int | float:
    if not isinstance(value, bool):
        for kind in (int, float):
            try:
                given = kind(str(value))
            except ValueError:
                continue
            return given
    raise ValueError(f"{name}: {short_repr(value)} is not a number; give one, such as 1")


def listed(name: str, value: Any) -> Sequence[Any]:
    """A setting's values: of a list, of a text such as "[4k,64k]", or the one value itself."""
    if isinstance(value, str):
        items = (item.strip(" '\"") for item in value.strip("[] ").split(","))
        value = [item for item in items if item]
    elif not isinstance(value, list | tuple):
        value = [value]
    if not value:
        raise ValueError(f"{name}: the list is empty; give one value or more")
    return value


def evenly_spaced(count: int) -> list[float]:
    """`count` shares from 0 to 1; one is in the middle."""
    return [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
