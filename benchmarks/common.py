"""What the benchmarks share: timing on the GPU, the speed of a copy, and the report."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from yoco_eval.lengths import as_argument, parse_length, parse_lengths
from yoco_eval.reports.files import ResultsError, write_atomically

_FLUSH_BYTES = 1 << 28  # several times any L2 cache
_TURN = 0.1  # seconds


# Context lengths on the command line, such as 64k and 64k,...,1m.
context_length, lengths = as_argument(parse_length), as_argument(parse_lengths)


def count(text: str) -> int:
    """A positive whole number on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def counts(text: str) -> list[int]:
    """Positive whole numbers on the command line, such as 4,16,64."""
    return [count(part) for part in text.split(",")]


def require_gpu() -> torch.device:
    """The GPU that the benchmarks run on; ends the program where there is none."""
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a GPU, and PyTorch finds none")
    return torch.device("cuda")


def seconds(run: Callable[[], object]) -> float:
    """GPU time of one run, from an idle GPU to an idle GPU, launches included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def clear() -> None:
    """Gives memory that nobody holds any more back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def measure(run: Callable[[], object], repeats: int = 20) -> float:
    """Median GPU time in seconds of a short `run`, its inputs not in the L2 cache.

    Overwriting the cache takes the GPU longer than launching `run` takes the CPU, so that launches
    do not count.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):  # compiles and warms up
        run()
    events = []
    for _ in range(repeats):
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        flush.zero_()
        flush.zero_()
        pair[0].record()
        run()
        pair[1].record()
        events.append(pair)
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events) / 1000


def graphed(
    step: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, before: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """A run of `step` with each of the states, which it changes, as one CUDA graph.

    The states are first set to what they were before.
    """

    def steps() -> torch.Tensor:
        for state in states:
            out = step(state)
        return out

    steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = steps()

    def replay() -> torch.Tensor:
        states.copy_(before)
        graph.replay()
        return out

    return replay


def in_turns(forms: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median GPU time in seconds of one run of each form.

    The forms take turns, of about a tenth of a second or of one run, so that each is timed at the
    clock that the card's power limit leaves it. The first turn, on a card still cool, does not
    count.
    """
    times: dict[str, list[float]] = {name: [] for name in forms}
    repeats = 1
    for _ in range(turns + 1):
        for name, form in forms.items():
            times[name].append(seconds(partial(_repeat, form, repeats)) / repeats)
        repeats = max(1, round(_TURN / min(taken[-1] for taken in times.values())))
    return {name: median(taken[1:]) for name, taken in times.items()}


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source))


def environment(*packages: str) -> dict[str, str]:
    """The card, and the versions of Python, CUDA, torch, triton and the named packages."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {"card": card, "python": platform.python_version()}
    versions["cuda"] = torch.version.cuda or "none"
    for package in ("torch", "triton", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def report(
    title: str,
    rows: list[dict[str, str | float | None]],
    environment: dict[str, str],
    path: Path | None,
) -> None:
    """Prints one table, None as a dash, and writes the same as JSON to `path` unless it is None."""
    table = Table(
        title=title,
        caption=", ".join(f"{k} {v}" for k, v in environment.items()),
        box=None,
        pad_edge=False,
        padding=(0, 1),
    )
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*map(shown, row.values()))
    Console().print(table)
    if path is not None:
        content = {"title": title, "environment": environment, "rows": rows}
        text = json.dumps(content, indent=2) + "\n"
        try:
            write_atomically(path, lambda file: file.write(text.encode()))
        except ResultsError as error:
            sys.exit(f"error: {error}")


def shown(value: str | float | None) -> str:
    """A cell: of a float four digits, or all before the point; None as a dash."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
