"""Runs lm-eval's generators of RULER's prompts: seeded, on local texts, and fast at any length.

What they write stays theirs. From outside, for as long as they run, this replaces what they look up
by name: how many samples they make, where texts come from, how tokens are counted, and the steps of
their searches for the largest prompt that fits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from tqdm import tqdm

from .haystack import ESSAYS
from .hub_data import load
from .prompts import TokenCounter

# By module of lm-eval: the function that makes the samples of one context length; and which
# argument of its `generate_input_output` is the size that it searches for, if it does.
_SAMPLERS = {
    "niah_utils": ("generate_samples", 0),
    "vt_utils": ("sys_vartrack_w_noise_random", 0),
    "cwe_utils": ("sys_word_pair_random", 0),
    "fwe_utils": ("sys_kwext", None),
    "qa_utils": ("generate_samples", 1),
}
# How many times the tokens of another a prompt of the same size may have. ruler_cwe's with their
# example have more words to even that out, and each try has others.
_SPREAD, _SPREAD_WITH_EXAMPLE = 1.25, 1.1


class _Tokenizer:
    """Stands in for a tokenizer in all that the generators ask of one: how many tokens there are.

    Attributes:
        last: the latest answer.
        beyond: tokens to add to each, for what the generators do not count.
    """

    def __init__(self, counter: TokenCounter) -> None:
        self._counter = counter
        self.last = self.beyond = 0

    def __call__(self, text: str) -> SimpleNamespace:
        self.last = self._counter.count(text) + self._counter.special + self.beyond
        return SimpleNamespace(input_ids=range(self.last))


class _Search:
    """A generator's `generate_input_output`, which skips those of its calls that tell it nothing.

    To find the largest prompt that fits, a generator makes and counts one after another, a step
    longer each: thousands at a million tokens. The tokens of some tell how far the next ones are
    from too long, so all but a few get the smallest prompt again, which fits as well. Samples come
    after, and are all made.
    """

    def __init__(
        self, make: Callable, place: int, room: int, tokenizer: _Tokenizer, spread: float
    ) -> None:
        self._make = make
        self._place = place
        self._room = room
        self._spread = spread
        self._tokenizer = tokenizer
        self._searching = True
        self._smallest: Any = None
        self._smallest_size = 0
        self._made = 0  # the size of a prompt that is not counted yet
        self._worthwhile = 0.0  # the size from which on prompts are made

    def __call__(self, *args: Any, **options: Any) -> Any:
        if "docs" in options:  # where all are taken, they are shuffled in place
            options["docs"] = list(options["docs"])
        size = args[self._place]
        if not self._searching:
            if size == 0:  # the search stopped at once, as it counts more than a prompt
                size = self._smallest_size
            return self._make(*args[: self._place], size, *args[self._place + 1 :], **options)
        if self._smallest is None:
            self._room -= self._tokenizer.last  # what is counted before: ruler_vt's example
        elif self._made:
            self._learn()
        if size < self._worthwhile:
            return self._smallest
        self._made = size
        made = self._make(*args, **options)
        if self._smallest is None:
            self._smallest, self._smallest_size = made, size
        return made

    def samples(self, steps: Iterable[int], **options: Any) -> Iterable[int]:
        """The generators' `tqdm`, which they call when the search is over.

        Raises:
            _TooShort: even the smallest prompt may not fit; some would try it forever.
        """
        self._searching = False
        if self._smallest is None:
            raise _TooShort(0)
        prompt = max((part for part in self._smallest if isinstance(part, str)), key=len)
        needed = int(len(self._tokenizer(prompt).input_ids) * self._spread)
        if needed > self._room:
            raise _TooShort(needed - self._room)
        return tqdm(steps, **options, leave=False, delay=1)

    def _learn(self) -> None:
        """From the tokens of the prompt made last: what larger one is worth making."""
        tokens = self._tokenizer.last
        self._worthwhile = self._made * (1 + 0.9 * (self._room - tokens) / tokens)
        self._made = 0


def _with_example(make: Callable, kept: bool) -> Callable:
    """ruler_cwe's `generate_input_output`, its one-shot example before the prompt or left out.

    RULER's authors have it before the prompt. lm-eval counts it, and leaves it out all the same.
    """

    def joined(*args: Any, **options: Any) -> tuple[str, str, list[str]]:
        example, prompt, answer = make(*args, **options)
        return "", f"{example}\n{prompt}" if kept else prompt, answer

    return joined


class _TooShort(Exception):
    """A context length lacks about so many tokens; 0 if nobody can tell."""


def generate(
    task: str,
    dataset: Callable,
    counter: TokenCounter,
    context_lengths: Sequence[int],
    *,
    samples: int,
    seed: int,
    answer: int,
    delimiter: str,
    data: str | None,
    warn: Callable[[str], object],
) -> list[dict[str, Any]]:
    """The samples of a task as its generator makes them, shorter context lengths first.

    Their `length` is the tokens of prompt and answer: at most the context length, `max_length`.

    Args:
        task: its name.
        dataset: lm-eval's function that makes all its documents.
        counter: counts with the evaluated model's tokenizer.
        context_lengths: in tokens.
        samples: how many per context length.
        seed: documents depend on it, on task and context length, and on nothing drawn before.
        answer: tokens to generate.
        delimiter: what stands between the sample's `input` and its `gen_prefix` in the prompt.
        data: folder of the texts, None to download them.
        warn: is told what the user should know.

    Raises:
        ValueError: a context length is too short, or texts are missing.
    """
    names = dataset.__globals__
    module = Path(dataset.__code__.co_filename).stem
    name, place = _SAMPLERS[module]
    make_samples = names[name]
    tokenizer = _Tokenizer(counter)
    collected: list[dict[str, Any]] = []

    def run(*args: Any, kept: bool = True, **options: Any) -> list[dict[str, Any]]:
        length = options["max_seq_length"]
        key = f"ruler/{seed}/{task}/{length}"
        replaced: dict[str, Any] = {"RNG": random.Random(key), "print": lambda *_: None}
        replaced["tqdm"] = partial(tqdm, leave=False, delay=1)
        tokenizer.last = 0
        if place is None:  # ruler_fwe would take words away forever if its frame alone did not fit
            frame = tokenizer(make_samples.__globals__["TEMPLATE"]).input_ids
            if 2 * len(frame) + answer > length:
                raise _TooShort(2 * len(frame) + answer - length)
        else:
            make = make_samples.__globals__["generate_input_output"]
            if module == "cwe_utils":
                make = _with_example(make, kept)
            spread = _SPREAD_WITH_EXAMPLE if kept and module == "cwe_utils" else _SPREAD
            search = _Search(make, place, length - answer, tokenizer, spread)
            replaced |= {"generate_input_output": search, "tqdm": search.samples}
        with patch.dict(make_samples.__globals__, replaced), _seeded(key):
            return make_samples(*args, **options)

    def sample(*args: Any, **options: Any) -> list[dict[str, Any]]:
        """Takes the place of lm-eval's function of this name, and collects what that one makes."""
        tokenizer.beyond = 0
        if options.get("num_samples") == 1:  # the example that ruler_vt shows
            while True:
                try:
                    return run(*args, **options)
                except _TooShort as error:  # for a tokenizer with more tokens than most
                    options["max_seq_length"] += error.args[0]
        length = options["max_seq_length"]
        questions = options.get("qas")
        if questions is not None and len(questions) < samples:
            raise ValueError(f"samples: {task} has {len(questions)} questions, {samples} are asked")
        kept = True
        while True:
            try:
                made = run(*args, kept=kept, **options | {"num_samples": samples})
            except _TooShort as error:
                lack = error.args[0]
                if kept and module == "cwe_utils":
                    kept = False
                    continue
                raise ValueError(
                    f"context_lengths: {length} is too short for {task}; give longer ones"
                    + (f", from about {length + lack} on" if lack else "")
                ) from error
            for one in made:
                prompt = one["input"] + delimiter + one["gen_prefix"]
                one["length"] = counter.special + counter.count(prompt) + answer
            excess = max(one["length"] for one in made) - length
            if excess <= 0:
                if not kept:
                    warn(
                        f"{task}: its example takes more tokens than context length {length} has "
                        "room for; prompts of this length are without it"
                    )
                collected.extend(made)
                return []
            tokenizer.beyond += excess  # which the generator has not counted

    replaced = {name: sample, "get_tokenizer": lambda *_, **__: tokenizer}
    if "get_haystack" in names:
        replaced["get_haystack"] = _haystacks(names["get_haystack"], data, max(context_lengths))
    if "download_json" in names:
        replaced["download_json"] = _downloads(names["download_json"], data)
        for reader in ("read_squad", "read_hotpotqa"):  # without their memory of other folders
            replaced[reader] = names[reader].__wrapped__
    with patch.dict(names, replaced):
        dataset(max_seq_lengths=context_lengths)
    return collected


@contextmanager
def _seeded(key: str) -> Iterator[None]:
    """The global generators of random numbers, which lm-eval draws from, seeded for a while."""
    states = random.getstate(), np.random.get_state()
    random.seed(key)
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _haystacks(get_haystack: Callable, data: str | None, words: int) -> Callable:
    """lm-eval's function, whose essays begin anew where they end, up to so many words."""

    def get(type_haystack: str) -> str | list[str]:
        if type_haystack != "essay":
            return get_haystack(type_haystack)
        _require_sentences()
        essays = load(ESSAYS, None, ESSAYS.partition("/")[2], data, split="train")["text"]
        own = " ".join(essays).split()
        return own * -(-words // len(own))

    return get


def _require_sentences() -> None:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise ValueError(
            "RULER's essays are split into sentences with NLTK's punkt_tab, which is missing; "
            "connect and run python -m nltk.downloader punkt_tab, or set NLTK_DATA to a folder "
            "with tokenizers/punkt_tab"
        ) from error


def _downloads(download_json: Callable, data: str | None) -> Callable:
    """lm-eval's function, or one that reads the file of that name in the folder `data`."""

    def get(url: str) -> Any:
        name = url.rpartition("/")[2]
        if data is None:
            try:
                return download_json(url)
            except Exception as error:  # whatever requests raises
                raise ValueError(
                    f"{url} could not be downloaded ({type(error).__name__}); give a folder with "
                    f"{name} in it with --metadata data=FOLDER"
                ) from None
        path = Path(data, name).expanduser()
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"data: {path} cannot be read; put {url} there") from error

    return get
