"""Memory that scoring a whole text takes on a CPU: what is planned, and the peak, side by side.

    python benchmarks/memory.py [--lengths 4k,16k] [--dtypes float32 bfloat16] [--scored 4k]
        [--output FILE.json]

Every position of a text of random tokens is scored, so that all of them pass the cross-decoder; or
with --scored, only so many at its end, where the most there is to read is read.
Each row is a process of its own: gaps that an earlier run left in the heap would count. The plan is
what the engine holds against the free memory before it starts; the peak is how far the process's
resident memory rose above what it was with the model loaded. Time grows with the square of the
length: on two cores the demo takes a minute for 16K tokens, and hours for all of 256K, but minutes
for the last 4K of them.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import torch
from common import lengths, report

from yoco_eval.engine import Engine
from yoco_eval.lengths import as_argument, format_length, parse_length
from yoco_eval.memory import fit
from yoco_eval.model import load
from yoco_eval.model.checkpoint import DEFAULT_CHECKPOINT
from yoco_eval.requests import ScoreRequest

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", default=DEFAULT_CHECKPOINT, help="(default: %(default)s)")
    parser.add_argument(
        "--lengths", type=lengths, default="4k,16k", help="in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES], help="(default: both)"
    )
    parser.add_argument(
        "--scored", type=as_argument(parse_length), help="positions of each text (default: all)"
    )
    parser.add_argument("--output", type=Path, help="also write to this .json file")
    args = parser.parse_args()
    rows = []
    for length in args.lengths:
        for dtype in args.dtypes:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                rows.append(
                    process.submit(measure, args.pretrained, dtype, length, args.scored).result()
                )
                print(".", end="", flush=True, file=sys.stderr)
    environment = {
        "processor": platform.machine(),
        "threads": str(torch.get_num_threads()),
        "checkpoint": args.pretrained,
        "torch": version("torch"),
    }
    report("Scoring a text on a CPU", rows, environment, args.output)


def measure(
    pretrained: str, name: str, length: int, scored: int | None
) -> dict[str, str | float | None]:
    """A row, of a process that has done nothing else yet."""
    dtype = DTYPES[name]
    model = load(pretrained, CPU, dtype)
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=length + 1)
    first = length + 1 - min(scored or length, length)
    request = ScoreRequest(tokens[:first], tokens[first:])
    planned = fit(model.costs, dtype, CPU, length, loaded=True, tokens=length).need
    loaded = psutil.Process().memory_info().rss
    start = time.perf_counter()
    list(Engine(model).score([request], lambda count: None, lambda count: None))
    seconds = time.perf_counter() - start
    peak = _most_resident() - loaded
    return {
        "tokens": format_length(length),
        "dtype": name,
        "plan MiB": planned / MIB,
        "peak MiB": peak / MIB,
        "peak / plan": peak / planned,
        "seconds": seconds,
    }


def _most_resident() -> int:
    """The most bytes that were resident at a time, loading included."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
