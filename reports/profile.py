"""Memory, prefill time, decode speed and throughput by context length: what was measured, and its
tables.

A profile is of one model, or of one and another that it is compared with. What could not be
measured, for want of memory or patience, is said where its figure would stand.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from yoco_eval.lengths import format_length
from yoco_eval.printable import VALUE, one_line, shown

from .results import ResultsError, read_json

MEASURED, OUT_OF_MEMORY, OUT_OF_PATIENCE = "measured", "out of memory", "out of patience"
OUTCOMES = (MEASURED, OUT_OF_MEMORY, OUT_OF_PATIENCE)

KIND = "yoco-eval profile"  # stands in the JSON
LONGEST = 79  # letters of a name
_MOST = 10**15  # of whatever is measured
GIB, MIB = 2**30, 2**20
AT_LEAST = "≥"  # before a gain that is a lower bound
BATCHES = (1, 8, 64)  # whose throughput is told, beside that of the largest batch
CONTEXTS = {False: "distinct contexts", True: "one shared context"}  # by whether it is shared

# What a profile is about: fields or properties of its rows.
PEAK, PREFILL, DECODE = "peak_bytes", "prefill_seconds", "decode_tokens_per_second"
THROUGHPUT = {False: "distinct_tokens_per_second", True: "shared_tokens_per_second"}


@dataclass(frozen=True)
class Throughput:
    """Of a batch of texts that decode side by side, two at least.

    batch: how many.
    shared: whether all continue one context, which is kept and read once; else each has its own.
    outcome: as of a row; what did not fit, or took too long, and larger ones were not tried.
    tokens_per_second: of all texts together.
    """

    batch: int
    shared: bool
    outcome: str
    tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        _check(self, "batch", lambda found: _is_count(found) and found > 1)
        _check(self, "shared", lambda found: isinstance(found, bool))
        _check(self, "outcome", OUTCOMES.__contains__)
        _check(self, "tokens_per_second", _is_figure, optional=self.outcome != MEASURED)


@dataclass(frozen=True)
class ProfileRow:
    """One model at one context length. What is not known is None.

    length: tokens.
    outcome: "measured", "out of memory" or "out of patience".
    weights_bytes, cache_bytes: what they take; known even where memory ran out, as a rule.
    peak_bytes: the most that was allocated; None on a CPU.
    prefill_seconds: until the first prediction.
    decode_tokens_per_second: after `length` tokens, one text at a time.
    throughput: of batches of such texts.
    """

    model: str
    length: int
    outcome: str
    weights_bytes: int | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    prefill_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    throughput: tuple[Throughput, ...] = ()

    def __post_init__(self) -> None:
        _check(self, "model", _is_text)
        _check(self, "length", _is_count)
        _check(self, "outcome", OUTCOMES.__contains__)
        for name in ("weights_bytes", "cache_bytes", "peak_bytes"):
            _check(self, name, _is_count, optional=True)
        for name in ("prefill_seconds", "decode_tokens_per_second"):
            _check(self, name, _is_figure, optional=True)
        if self.peak_bytes is not None and None in (self.weights_bytes, self.cache_bytes):
            raise ResultsError("peak_bytes without weights_bytes and cache_bytes")
        if len({(one.batch, one.shared) for one in self.throughput}) < len(self.throughput):
            raise ResultsError("throughput of one batch twice")

    @property
    def weights_and_cache(self) -> int | None:
        """Bytes that it takes at least, known without running it."""
        if self.weights_bytes is None or self.cache_bytes is None:
            return None
        return self.weights_bytes + self.cache_bytes

    @property
    def parts(self) -> list[int | None]:
        """Bytes of weights, of the cache, and of all else at the peak."""
        rest = None
        if self.peak_bytes is not None and self.weights_and_cache is not None:
            rest = self.peak_bytes - self.weights_and_cache
        return [self.weights_bytes, self.cache_bytes, rest]

    def speeds(self, shared: bool) -> dict[int, float]:
        """Tokens per second by batch size, ascending; none where no batches were tried."""
        tried = [one for one in self.throughput if one.shared == shared]
        speeds = {one.batch: one.tokens_per_second for one in tried}
        if tried:
            speeds[1] = self.decode_tokens_per_second
        return {batch: speed for batch, speed in sorted(speeds.items()) if speed is not None}

    def fastest(self, shared: bool) -> int | None:
        """The batch size of the highest throughput."""
        speeds = self.speeds(shared)
        return max(speeds, key=lambda batch: speeds[batch], default=None)

    @property
    def distinct_tokens_per_second(self) -> float | None:
        """The highest throughput of batches with distinct contexts."""
        return max(self.speeds(False).values(), default=None)

    @property
    def shared_tokens_per_second(self) -> float | None:
        """The highest throughput of batches with one shared context."""
        return max(self.speeds(True).values(), default=None)


@dataclass(frozen=True)
class Gain:
    """How many times better the first model of a profile is than the second.

    at_least: it is a lower bound, of memory: the second model's peak was not measured, and its
        weights and cache, which are computed, stand for it.
    """

    times: float
    at_least: bool = False

    def __str__(self) -> str:
        mark = AT_LEAST if self.at_least else ""
        return f"{mark}{self.times:.{2 if self.times < 1 else 1}f}x"


@dataclass(frozen=True)
class Profile:
    """Rows, and how they came about.

    name: of what was measured, for titles.
    shapes: of each model, its configuration.
    device: name of the card or processor; device_bytes: its memory, None on a CPU.
    versions: of the packages that matter.
    prefill_chunk, decode_steps: tokens fed at a time; tokens decoded under the clock.
    patience: seconds of prefill that were the limit; infinite if there was none.
    seed: of random weights and tokens.
    rows: by model, then length.
    largest_batch: larger ones were not tried, whatever fits; None if none were.
    """

    name: str
    shapes: dict[str, dict[str, Any]]
    dtype: str
    device: str
    device_bytes: int | None
    versions: dict[str, str]
    prefill_chunk: int
    decode_steps: int
    patience: float
    seed: int
    rows: tuple[ProfileRow, ...]
    largest_batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("name", "dtype", "device"):
            _check(self, name, _is_text)
        for name in ("prefill_chunk", "decode_steps"):
            _check(self, name, _is_count)
        for name in ("device_bytes", "largest_batch"):
            _check(self, name, _is_count, optional=True)
        _check(self, "patience", lambda found: found == math.inf or _is_figure(found))
        _check(self, "versions", _is_flat)
        _check(self, "shapes", _is_table)
        for shape in self.shapes.values():
            if not _is_flat(shape):
                raise ResultsError(f"a shape is {shown(shape)}")
        if not self.rows or len(self.models) > 2:
            raise ResultsError(f"rows of {len(self.models)} models, not of one or two")
        if len({(row.model, row.length) for row in self.rows}) < len(self.rows):
            raise ResultsError("two rows of one model at one length")

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row.model for row in self.rows))

    @property
    def lengths(self) -> list[int]:
        return sorted({row.length for row in self.rows})

    @property
    def has_throughput(self) -> bool:
        """Whether batches were tried, which older profiles did not do."""
        return any(row.throughput for row in self.rows)

    def row(self, model: str, length: int) -> ProfileRow | None:
        rows = [row for row in self.rows if (row.model, row.length) == (model, length)]
        return rows[0] if rows else None

    def gain(self, quantity: str, length: int) -> Gain | None:
        """How many times better the first model is than the second.

        It is known where both were measured, and of memory also where the second one was out of
        memory or patience. A first model's peak is always measured: on a CPU, where no peaks are,
        there is no gain of memory.

        quantity: `PEAK`, `PREFILL`, `DECODE` or one of `THROUGHPUT`.
        """
        rows = [row for model in self.models if (row := self.row(model, length))]
        if len(rows) < 2:
            return None
        first, second = (getattr(row, quantity) for row in rows)
        bounded = quantity == PEAK and rows[1].outcome != MEASURED
        if bounded:
            second = rows[1].weights_and_cache
        if not first or not second:
            return None
        less_is_better = quantity in (PEAK, PREFILL)
        return Gain(second / first if less_is_better else first / second, bounded)


class NotAProfile(ResultsError):
    """A file of another kind."""


def load_profile(path: str | Path) -> Profile:
    """Reads what `profile_files.save_profile` wrote.

    Raises ResultsError if it cannot be read or is damaged, NotAProfile if it is something else.
    """
    try:
        data = read_json(Path(path))
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise NotAProfile(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict) or data.pop("kind", None) != KIND:
        raise NotAProfile(f"{path}: not a profile; yoco-eval profile -o FILE.json writes one")
    try:
        rows = tuple(_row(**row) for row in data.pop("rows"))
        if data.get("patience", 0) is None:
            data["patience"] = math.inf
        return Profile(**data, rows=rows)
    except (ResultsError, TypeError, KeyError) as error:
        reason = shown(error.args[0]) if isinstance(error, KeyError) else error
        raise ResultsError(f"{path}: a damaged profile ({reason}); measure it again") from error


def _row(throughput: Sequence[dict[str, Any]] = (), **row: Any) -> ProfileRow:
    return ProfileRow(**row, throughput=tuple(Throughput(**one) for one in throughput))


def _check(of: Any, name: str, holds: Callable[[Any], bool], optional: bool = False) -> None:
    found = getattr(of, name)
    if not (optional and found is None or holds(found)):
        raise ResultsError(f"{name} is {shown(found)}")


def _is_text(found: Any) -> bool:
    return isinstance(found, str)


def _is_count(found: Any) -> bool:
    return isinstance(found, int) and _is_figure(found)


def _is_figure(found: Any) -> bool:
    """Whether it may have been measured, and can be drawn."""
    return isinstance(found, int | float) and not isinstance(found, bool) and 0 < found < _MOST


def _is_table(found: Any) -> bool:
    return isinstance(found, dict)


def _is_flat(found: Any) -> bool:
    plain = str | int | float | None
    return _is_table(found) and all(isinstance(one, plain) for one in found.values())


def describe_row(row: ProfileRow) -> str:
    """One line, for those who wait for the rest."""
    start = f"{row.model}, {format_length(row.length)} tokens"
    if row.outcome != MEASURED:
        return f"{start}: {row.outcome}"
    text = (
        f"{start}: prefill {_number(row.prefill_seconds)} s, "
        f"decode {_number(row.decode_tokens_per_second)} tokens/s"
    )
    for shared, contexts in CONTEXTS.items():
        if batch := row.fastest(shared):
            text += f", {_number(row.speeds(shared)[batch])} at batch {batch} ({contexts})"
    return text


def describe(profile: Profile) -> str:
    """The line below the title: the device, the data type, versions, how it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in profile.versions.items())
    what = one_line(f"{profile.device}, {profile.dtype}, {versions}", VALUE)
    peak = "" if profile.device_bytes else "; peaks of memory are measured on GPUs only"
    batches = ""
    if profile.has_throughput and profile.largest_batch:
        batches = f", throughput at batches of up to {profile.largest_batch}"
    return (
        f"{what}; prefill {format_length(profile.prefill_chunk)} tokens at a time, "
        f"decode at batch 1{batches}{peak}"
    )


def explain_gain(profile: Profile) -> list[str]:
    """What a gain divides by what, and what the mark of a bound means; of one model, nothing."""
    if len(profile.models) < 2:
        return []
    first, second = (one_line(model, LONGEST) for model in profile.models)
    lines = [f"gain: {second} / {first} of memory and time, {first} / {second} of tokens/s"]
    if profile.has_throughput:
        lines.append("gain in throughput: of the highest that either of them reaches")
    gains = [profile.gain(PEAK, length) for length in profile.lengths]
    if any(gain and gain.at_least for gain in gains):
        lines.append(
            f"{AT_LEAST}: at least; weights + cache of {second}, computed, stand for its peak"
        )
    return lines


def print_profile(profile: Profile, console: Console) -> None:
    """Prints tables of at most 80 columns: memory and its parts, speed, and throughput."""
    console.print(Text(one_line(profile.name, VALUE), style="bold"))
    console.print(Text(describe(profile)))
    unit, unit_name = memory_unit(profile)

    def memory(row: ProfileRow) -> list[str]:
        numbers = [
            "-" if part is None else f"{part / unit:.2f}" for part in (*row.parts, row.peak_bytes)
        ]
        return numbers if row.outcome == MEASURED else [*numbers[:2], row.outcome]

    def speed(row: ProfileRow) -> list[str]:
        if row.outcome != MEASURED:
            return [row.outcome]
        return [_number(row.prefill_seconds), _number(row.decode_tokens_per_second)]

    def throughput(row: ProfileRow, shared: bool) -> list[str]:
        if row.outcome != MEASURED:
            return [row.outcome]
        speeds = row.speeds(shared)
        unmeasured = [one for one in row.throughput if one.outcome != MEASURED]
        stopped = next((one for one in unmeasured if one.shared == shared), None)
        told = [batch for batch in BATCHES if not stopped or batch < stopped.batch]
        figures = [_number(speeds.get(batch)) for batch in told]
        if stopped and told != list(BATCHES):
            return [*figures, stopped.outcome]
        largest = max(speeds, default=None)
        return [*figures, str(largest or "-"), _number(speeds.get(largest or 0))]

    console.print()
    console.print(Text(f"Memory in {unit_name}: weights + cache + rest = peak", style="bold"))
    columns = [("weights", 8), ("cache", 7), ("rest", 8), ("peak", 8)]
    _print_table(profile, console, columns, memory, [("peak", PEAK)])
    console.print()
    console.print(Text("Prefill in seconds, decode in tokens per second", style="bold"))
    columns = [("prefill", 9), ("decode", 9)]
    gains = [("prefill", PREFILL), ("decode", DECODE)]
    _print_table(profile, console, columns, speed, gains)
    for shared, contexts in CONTEXTS.items() if profile.has_throughput else ():
        console.print()
        title = f"Throughput in tokens per second by batch size, {contexts}"
        console.print(Text(title, style="bold"))
        columns = [("1", 6), ("8", 6), ("64", 7), ("max", 5), ("at max", 8)]
        gains = [("highest", THROUGHPUT[shared])]
        _print_table(profile, console, columns, partial(throughput, shared=shared), gains)
    if explained := explain_gain(profile):
        console.print()
        console.print(Text("\n".join(explained)))


def _print_table(
    profile: Profile,
    console: Console,
    columns: Sequence[tuple[str, int]],
    cells: Callable[[ProfileRow], Sequence[str]],
    gains: Sequence[tuple[str, str]],
) -> None:
    """A line per length. `cells` gives a row's texts, of which the last one may be wider."""
    gains = gains if len(profile.models) > 1 else []
    width = sum(width for _, width in columns)
    models = [one_line(model, width - 3) for model in profile.models]
    groups = [f"{'':7}"] + [f" {f' {model} ':─^{width - 1}}" for model in models]
    names = [f"{'context':>7}"]
    names += ["".join(f"{name:>{width}}" for name, width in columns)] * len(profile.models)
    if gains:
        groups.append(f"  {' gain ':─^{9 * len(gains) - 2}}")
        names.append("".join(f"{name:>9}" for name, _ in gains))
    console.print(Text("".join(groups)))
    console.print(Text("".join(names)))
    for length in profile.lengths:
        line = Text(f"{format_length(length):>7}")
        for model in profile.models:
            row = profile.row(model, length)
            texts = cells(row) if row else ["-"]
            padded = [f"{t:>{w}}" for t, (_, w) in zip(texts[:-1], columns, strict=False)]
            line.append("".join(padded))
            missing = len(texts) < len(columns)
            room = width - sum(map(len, padded))
            line.append(f"{texts[-1]:>{room}}", style="dim" if missing else "")
        for _, quantity in gains:
            gain = profile.gain(quantity, length)
            line.append(f"{gain or '-'!s:>9}", style="bold" if gain else "dim")
        console.print(line)


def memory_unit(profile: Profile) -> tuple[int, str]:
    """GiB, or MiB where all is less than one GiB."""
    known = [
        row.peak_bytes or (row.weights_bytes or 0) + (row.cache_bytes or 0) for row in profile.rows
    ]
    return bytes_unit(max(known))


def bytes_unit(largest: int) -> tuple[int, str]:
    """The one, and its name, for figures of which this is the largest."""
    return (GIB, "GiB") if largest >= GIB else (MIB, "MiB")


def _number(value: float | None) -> str:
    """Three digits or so, without an exponent; a dash for None."""
    if value is None:
        return "-"
    decimals = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"
