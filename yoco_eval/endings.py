"""Where an answer begins and ends in what is generated: after the thinking, at a stop string.

The text is lm-eval's to cut (`postprocess_generated_text`): thinking goes first, with the blanks
after it, so that no stop string counts there. Generation ends by the same rule, with the first
token that completes a stop string in what would be the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lm_eval.models.utils import postprocess_generated_text
from transformers import PreTrainedTokenizerBase

# Tokens to look back, beside a text's bytes, of which each token is at least one: decoding may
# change the first characters of a piece of text.
_MARGIN = 8


class Endings:
    """Reads answers, and says when they are complete.

    Args:
        tokenizer: the model's.
        think_end: what ends its thinking, a text or the id of a token; None: it does not think. The
            text of a special token stands for its id, as decoding leaves such tokens out.

    Raises:
        ValueError: an id that no token has.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, think_end: str | int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        if isinstance(think_end, int) and think_end not in tokenizer.get_vocab().values():
            raise ValueError(
                f"think_end_token: {think_end} is the id of no token of {tokenizer.name_or_path}"
            )
        added = tokenizer.added_tokens_decoder.items()
        ids = (i for i, token in added if token.special and token.content == think_end)
        self._think_end = next(ids, think_end)

    def answer(self, tokens: Sequence[int], until: Sequence[str]) -> str:
        """What lm-eval makes of generated tokens: thinking and stop strings are cut off."""
        end = self._think_end
        if not isinstance(end, int):
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            return postprocess_generated_text(text, list(until), end)
        for last in range(len(tokens) - 1, -1, -1):
            if tokens[last] == end:
                tokens = tokens[last + 1 :]
                break
        text = self._tokenizer.decode(tokens, skip_special_tokens=True).lstrip()
        return postprocess_generated_text(text, list(until), None)

    def thinks(self, tokens: list[int]) -> bool:
        """Whether nothing in generated tokens ends the thinking of a model that thinks."""
        end = self._think_end
        if isinstance(end, int):
            return end not in tokens
        return end is not None and end not in self._decode(tokens)

    def stopper(self, until: Sequence[str]) -> Callable[[list[int], int], int | None] | None:
        """Says with which generated token a stop string is complete, as `GenerateRequest` asks.

        It is for one answer, whose tokens it sees grow.
        """
        if not until:
            return None
        window = max(len(stop.encode()) for stop in until) + _MARGIN
        # While the model thinks, None; then the tokens after which the answer begins, and what the
        # last of them says of it already.
        begin: int | None = 0 if self._think_end is None else None
        head = ""

        def stops(text: str) -> bool:
            return any(stop in text for stop in until)

        def found(tokens: list[int]) -> bool:
            return stops(self._decode(tokens))

        def stop(tokens: list[int], seen: int) -> int | None:
            nonlocal begin, head
            if self._think_end is None:
                return self._first(tokens, seen, window, found)
            if begin is None:
                begin = self._thought(tokens, seen)
                if begin is None:
                    return None
                head = self._behind(tokens[:begin])
                if stops(head):
                    return begin
            # The first words of the answer, with no blanks before them.
            end = max(seen, begin)
            while end < min(len(tokens), begin + window):
                end += 1
                if stops((head + self._decode(tokens[begin:end])).lstrip()):
                    return end
                if not head and end == begin + 1 and self._is_blank(tokens[begin]):
                    begin = end
            return self._first(tokens, end, window, found)

        return stop

    def _thought(self, tokens: list[int], seen: int) -> int | None:
        """With which token, not one of the first `seen`, the thinking ends; None if it goes on."""
        end = self._think_end
        if isinstance(end, int):
            return tokens.index(end, seen) + 1 if end in tokens[seen:] else None
        assert end is not None
        window = len(end.encode()) + _MARGIN
        return self._first(tokens, seen, window, lambda piece: end in self._decode(piece))

    def _behind(self, tokens: list[int]) -> str:
        """What the last of these tokens, which ends the thinking, says behind the end."""
        end = self._think_end
        if not isinstance(end, str):
            return ""
        piece = self._decode(tokens[-len(end.encode()) - _MARGIN :])
        return piece.rpartition(end)[2].lstrip()

    def _is_blank(self, token: int) -> bool:
        """Whether nothing is left of a token at the beginning of an answer."""
        return not self._tokenizer.decode([token], skip_special_tokens=True).strip()

    def _first(
        self, tokens: list[int], seen: int, window: int, found: Callable[[list[int]], bool]
    ) -> int | None:
        """The first end behind `seen` of up to `window` tokens in which something is found."""
        ends = range(seen + 1, len(tokens) + 1)
        # Tokens that come later change what is before them only where blanks are cleaned up.
        at_once = not self._tokenizer.clean_up_tokenization_spaces
        if len(ends) > 1 and at_once and not found(tokens[max(0, seen + 1 - window) :]):
            return None
        return next((end for end in ends if found(tokens[max(0, end - window) : end])), None)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)
