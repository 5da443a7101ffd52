"""Several GPUs of one machine against one: YOCO-3B's shape, random weights, bfloat16.

    python benchmarks/scaling.py [--gpus 1 2] [--parts data together single longest]
        [--length 1m] [--longest 10m] [--context-parallel N] [--output FOLDER]

It starts its processes itself, for each number of GPUs as torchrun does, and has four parts:

- data: a grid of needles at `--length` (11 depths, 2 samples, up to 16 new tokens) and 2000
  multiple-choice questions (those of `scoring.py`) through lm-eval's backend `yoco`, the documents
  dealt out one by one as lm-eval deals them. Timed from the call until all have all answers, texts
  to tokens included; making texts and loading the model is not. Prompts are random tokens which
  share what those of yoco_needle share (`prompts.py`); a tokenizer that has a word for each token
  stands between. Beside all seconds stand those that the busiest process was in the engine, which
  are compared with the mean, and at texts; answers are compared with those of one process: in
  bfloat16, what is computed side by side moves roundings. With `--context-parallel N`, where there
  are several GPUs, N hold each text together, and groups of N answer different ones.
- together: a prompt of `--length` that all processes hold together (`context_parallel`), through
  the engine: seconds to the first new token, new tokens per second after it, and the largest peak
  of memory of any card beside what the engine had planned.
- single: one process under torchrun against one without: both exist, and take turns.
- longest: as together, at `--longest`, on several GPUs alone.

With `--shape tiny`, the default where there is no GPU, processes are the CPU's and talk through
gloo: that is for trying the script.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from common import clear, context_length, count, environment, report, require_gpu
from prompts import needle_grid
from scoring import ANSWERS, make_questions

from yoco_eval.lengths import format_length
from yoco_eval.model import GatedRetentionSettings, YocoConfig
from yoco_eval.model.shapes import SHAPES, with_random_weights

GIB = 2**30
SHAPES_HERE = SHAPES | {
    "tiny": YocoConfig(
        dim=64,
        n_layers=4,
        hidden_dim=96,
        n_attn_heads=4,
        n_attn_kv_heads=2,
        vocab_size=5000,
        self_decoder=GatedRetentionSettings(4),
    )
}
PARTS = ("data", "together", "single", "longest")
NEW = 16  # tokens of an answer about a needle
STEPS, STEPS_BEFORE = 96, 16  # decoded after one prompt, and those of them before the clock starts
WARM_UP = 1 << 16  # tokens of prompts that kernels are compiled and chosen with
MODERATE = 1 << 16  # tokens of a prompt in the part `single`
PATIENCE = 45.0  # seconds for processes to end that were told to

Row = dict[str, "str | float | None"]


class Failure(Exception):
    """Processes have failed, or taken too long."""


class Documents(NamedTuple):
    """lm-eval's documents, as it deals them out.

    Attributes:
        count: of all.
        each: requests of one.
        own: requests of every n-th document, in order, which are this one's of n processes.
    """

    count: int
    each: int
    own: list[Any]


def main() -> int:
    args = arguments()
    if args.worker is not None:
        work(args)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what was started
    folder = Path(tempfile.mkdtemp())
    failures = []
    try:
        for gpus in args.gpus:
            alone = {"longest"} if gpus == 1 else set()
            parts = [part for part in args.parts if part not in {"single", *alone}]
            if parts:
                try:
                    run(args, folder, gpus, parts)
                except Failure as failure:
                    failures.append(tell(str(failure)))
        if "single" in args.parts:
            try:
                take_turns(args, folder)
            except Failure as failure:
                failures.append(tell(str(failure)))
    finally:
        tables(args, folder)
        shutil.rmtree(folder)
    if failures:
        tell("error: " + "; ".join(failures))
    return len(failures) > 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    there = torch.cuda.device_count()
    some = [2**i for i in range((there or 2).bit_length())]
    parser.add_argument("--gpus", type=count, nargs="+", default=some, help=f"(default: {some})")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    shape = "3b" if there else "tiny"
    parser.add_argument("--shape", choices=SHAPES_HERE, default=shape, help=f"(default: {shape})")
    parser.add_argument("--cpu", action="store_true", help="even where there are GPUs")
    parser.add_argument("--length", type=context_length, help="(default: 1m; without GPU, 4k)")
    parser.add_argument("--longest", type=context_length, help="(default: 10m; without GPU, 16k)")
    parser.add_argument("--depths", type=count, default=11, help="(default: 11)")
    parser.add_argument("--samples", type=count, default=2, help="(default: 2)")
    parser.add_argument("--questions", type=count, help="(default: 2000; without GPU, 60)")
    parser.add_argument(
        "--context-parallel", type=count, default=1, metavar="N", help="of the part `data`"
    )
    parser.add_argument("--turns", type=count, default=3, help="of a part `single` (default: 3)")
    parser.add_argument(
        "--timeout", type=count, default=240, help="seconds for all parts of one number of GPUs"
    )
    parser.add_argument("--output", type=Path, help="also write a .json file of each part there")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.cpu and there:
        require_gpu()
        if max(args.gpus) > there:
            parser.error(f"--gpus {max(args.gpus)}: there are {there}")
    args.cpu = args.cpu or not there
    bad = [n for n in args.gpus if n > 1 and n % args.context_parallel]
    if bad and args.worker is None:
        parser.error(f"--context-parallel {args.context_parallel} does not divide --gpus {bad[0]}")
    defaults = (4096, 16384, 60) if args.cpu else (2**20, 10**7, 2000)
    for name, default in zip(("length", "longest", "questions"), defaults, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def tell(text: str) -> str:
    print(text, file=sys.stderr, flush=True)
    return text


# -- the processes of one number of GPUs -----------------------------------------------------------


def start(
    args: argparse.Namespace, folder: Path, name: str, torchrun: int, parts: Sequence[str]
) -> subprocess.Popen:
    """A process, or as many as torchrun starts."""
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc_per_node", str(torchrun)]
    command += [__file__, "--worker", str(folder), "--name", name, "--parts", *parts]
    for option in ("shape", "length", "longest", "depths", "samples", "questions", "turns"):
        command += [f"--{option}", str(getattr(args, option))]
    command += ["--context-parallel", str(args.context_parallel if torchrun > 1 else 1)]
    # Nothing here gains by NVLink's multicast, and other users of the host can lose by it.
    environment = {"NCCL_NVLS_ENABLE": "0"} | os.environ
    command += ["--cpu"] * args.cpu
    return subprocess.Popen(command, stdout=sys.stderr, env=environment)


def end(process: subprocess.Popen) -> None:
    """torchrun ends its processes when it is told to end."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run(args: argparse.Namespace, folder: Path, gpus: int, parts: Sequence[str]) -> None:
    begin = time.perf_counter()
    process = start(args, folder, str(gpus), gpus if gpus > 1 else 0, parts)
    try:
        code = process.wait(args.timeout)
    except subprocess.TimeoutExpired:
        raise Failure(f"{gpus} GPUs: not done after {args.timeout} s") from None
    finally:
        end(process)
    if code:
        raise Failure(f"{gpus} GPUs: the processes ended with code {code}")
    tell(f"{gpus} GPUs: {time.perf_counter() - begin:.0f} s in all")


def take_turns(args: argparse.Namespace, folder: Path) -> None:
    deadline = time.monotonic() + args.timeout
    launched = {"plain": 0, "torchrun": 1}
    processes = {n: start(args, folder, n, count, ["single"]) for n, count in launched.items()}

    def wait_for(file: Path) -> None:
        while not file.exists():
            time.sleep(0.05)
            for name, process in processes.items():
                if process.poll() not in (None, 0):
                    raise Failure(f"single: {name} ended with code {process.returncode}")
            if time.monotonic() > deadline:
                raise Failure(f"single: not done after {args.timeout} s")

    try:
        for name in processes:
            wait_for(folder / f"{name}.ready")
        for turn in range(args.turns):
            for name in processes:
                (folder / f"{name}.go{turn}").touch()
                wait_for(folder / f"{name}.single{turn}.json")
        for process in processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
    finally:
        for process in processes.values():
            end(process)


# -- one process -----------------------------------------------------------------------------------


class Timed:
    """An engine, or an encoder of texts, and the seconds in it since it was last asked for them."""

    def __init__(self, whole: Any) -> None:
        self._whole, self._seconds = whole, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def seconds(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def score(self, *args: Any, **options: Any) -> Iterator[Any]:
        with self._running():
            yield from self._whole.score(*args, **options)

    def generate(self, *args: Any, **options: Any) -> Iterator[Any]:
        with self._running():
            yield from self._whole.generate(*args, **options)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        with self._running():
            return self._whole.encode_all(texts)

    @contextmanager
    def _running(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begin


class Worker:
    """What one process has: the backend with the model, its place, and where it leaves figures."""

    def __init__(self, args: argparse.Namespace) -> None:
        begin = time.perf_counter()
        from yoco_eval import lm
        from yoco_eval.ranks import join

        self.args, self.folder, self.name = args, args.worker, args.name
        config = SHAPES_HERE[args.shape]
        self.vocabulary = config.vocab_size
        lm.open_checkpoint = lambda *_: with_random_weights(config)  # type: ignore[assignment]
        self.lm = lm.YocoLM(
            tokenizer=str(self._tokenizer()),
            device="cpu" if args.cpu else None,
            batch_size="auto",
            max_length=2 * max(args.length, args.longest, MODERATE),
            context_parallel=args.context_parallel,
        )
        self.ranks = join()
        self.rank, self.size = (self.ranks.rank, self.ranks.size) if self.ranks else (0, 1)
        self.engine = self.lm.engine
        self.timed = self.lm.engine = Timed(self.engine)  # type: ignore[assignment]
        self.encoding = self.lm._encoder = Timed(self.lm._encoder)  # type: ignore[assignment]
        self.group: Any = None
        if self.ranks is not None:
            from yoco_eval.context_parallel import own_group

            self.group = own_group(self.size, self.ranks, self.lm.model.device)
        self.loading = time.perf_counter() - begin

    def _tokenizer(self) -> Path:
        """One that has the word w7 for token 7."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {f"w{i}": i for i in range(self.vocabulary - 2)}
        words |= {"<unk>": len(words), "</s>": len(words) + 1}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        tokenizer.save(str(folder / "tokenizer.json"))
        ends = {"eos_token": "</s>", "unk_token": "<unk>"}
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(ends | kind))
        return folder

    def everyones(self, own: Any) -> list[Any]:
        return [own] if self.ranks is None else self.ranks.collect(own)

    def leave(self, what: str, content: dict[str, Any]) -> None:
        """Writes figures for the process that has started this one, and tells them."""
        if self.rank:
            return
        short = {k: shortened(v) for k, v in content.items() if not isinstance(v, list)}
        tell(f"{self.name}: {what}: {short}")
        file = self.folder / f"{self.name}.{what}.json"
        file.with_suffix(".tmp").write_text(json.dumps(content))
        os.replace(file.with_suffix(".tmp"), file)

    def peak(self) -> int | None:
        return None if self.args.cpu else torch.cuda.max_memory_allocated()

    def clear(self) -> None:
        clear()
        if not self.args.cpu:
            torch.cuda.reset_peak_memory_stats()


def shortened(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def work(args: argparse.Namespace) -> None:
    worker = Worker(args)
    worker.leave("loading", {"seconds": max(worker.everyones(worker.loading))})
    for part in args.parts:
        WORK[part](worker)
        worker.clear()


def data(worker: Worker) -> None:
    args = worker.args
    warm_up(worker)
    grid = needle_texts(worker, args.length)
    asked = {"needles": (grid, worker.lm.generate_until)}
    asked["choices"] = choice_texts(worker, args.questions), worker.lm.loglikelihood
    for kind, (documents, ask) in asked.items():
        worker.leave(kind, evaluated(worker, documents, ask))


def warm_up(worker: Worker) -> None:
    """Compiles and chooses kernels."""
    few = min(worker.args.length, WARM_UP)
    evaluated(worker, needle_texts(worker, few, samples=1), worker.lm.generate_until)
    some = min(worker.args.questions, 64 * worker.size)
    evaluated(worker, choice_texts(worker, some), worker.lm.loglikelihood)


def needle_texts(worker: Worker, length: int, samples: int | None = None) -> Documents:
    args, words = worker.args, worker.vocabulary - 2
    prompts = needle_grid([length - NEW], args.depths, samples or args.samples, words)
    own: list[Any] = []
    for i in range(worker.rank, len(prompts), worker.size):
        settings = {"max_gen_toks": NEW, "until": []}
        own += requests("generate_until", i, [(text(prompts[i]), settings)])
    return Documents(len(prompts), 1, own)


def choice_texts(worker: Worker, number: int) -> Documents:
    questions, words, own = make_questions(number), worker.vocabulary - 2, []
    for i in range(worker.rank, number, worker.size):
        context, answers = (np.array(ids) % words for ids in questions[i])
        pairs = [(text(context), f" {text(answer)}") for answer in answers]
        own += requests("loglikelihood", i, pairs)
    return Documents(number, ANSWERS, own)


def text(ids: np.ndarray) -> str:
    return " ".join([f"w{i}" for i in ids.tolist()])


def requests(kind: str, document: int, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(kind, {}, pair, i, metadata=("scaling", document, 1))  # type: ignore[arg-type]
        for i, pair in enumerate(arguments)
    ]


def evaluated(
    worker: Worker, documents: Documents, ask: Callable[..., list[Any]]
) -> dict[str, Any]:
    """Seconds until all processes have all answers, those of the busiest one in the engine and
    that over the mean, those of the busiest one at texts, and the answers by document."""
    worker.everyones(None)
    worker.timed.seconds()
    worker.encoding.seconds()
    begin = time.perf_counter()
    answers = ask(documents.own, disable_tqdm=True)
    worker.lm.barrier()
    seconds = time.perf_counter() - begin
    own = answers, worker.timed.seconds(), worker.encoding.seconds()
    found, busy, encoding = zip(*worker.everyones(own), strict=True)
    each, answered = documents.each, []
    for document in range(documents.count):
        given, i = found[document % worker.size], document // worker.size
        answered.append(given[i * each : (i + 1) * each])
    spread = max(busy) * len(busy) / sum(busy)
    times = {"seconds": seconds, "engine": max(busy), "spread": spread, "texts": max(encoding)}
    return times | {"answers": answered}


def single(worker: Worker) -> None:
    """Takes turns with another process, as files say."""
    warm_up(worker)
    length = min(worker.args.length, MODERATE)
    asked = [
        (needle_texts(worker, length), worker.lm.generate_until),
        (choice_texts(worker, worker.args.questions), worker.lm.loglikelihood),
    ]
    (worker.folder / f"{worker.name}.ready").touch()
    for turn in range(worker.args.turns):
        while not (worker.folder / f"{worker.name}.go{turn}").exists():
            time.sleep(0.02)
        times = [evaluated(worker, *one)["seconds"] for one in asked]
        worker.clear()
        worker.leave(f"single{turn}", {"needles": times[0], "choices": times[1]})


def together(worker: Worker) -> None:
    answer_one(worker, min(worker.args.length, WARM_UP))
    found = [answer_one(worker, worker.args.length) for _ in range(2)]
    worker.leave("together", min(found, key=lambda one: one["prefill"]))


def longest(worker: Worker) -> None:
    for length in {min(worker.args.longest, WARM_UP), min(worker.args.longest, worker.args.length)}:
        answer_one(worker, length)
    worker.leave("longest", answer_one(worker, worker.args.longest))


@torch.inference_mode()
def answer_one(worker: Worker, length: int) -> dict[str, Any]:
    """Figures of one prompt and its answer, held together by all processes."""
    from yoco_eval.requests import GenerateRequest

    model = worker.lm.model
    times: list[float] = []

    def progress(done: int, spared: int = 0) -> None:
        times.append(time.perf_counter())

    groups, model.group = model.group, worker.group
    worker.clear()
    context = np.random.default_rng(0).integers(worker.vocabulary, size=length)
    request = GenerateRequest(context, STEPS)
    worker.everyones(None)
    begin = time.perf_counter()
    run = worker.engine._generation([request], progress)
    planned = model.costs.weight_bytes(model.dtype) + run.batch.need
    [(_, answer)] = run.answers()
    del run
    del times[:-STEPS]  # those of the prompt
    decoding = times[-1] - times[STEPS_BEFORE]
    model.group = groups
    own = (worker.peak(), taken(worker), answer)
    every = worker.everyones(own)
    if any(other != answer for _, _, other in every):
        raise ValueError("processes that hold a text together have answered differently")
    peaks, cards, _ = zip(*every, strict=True)
    return {
        "tokens": length,
        "prefill": times[0] - begin,
        "speed": (STEPS - 1 - STEPS_BEFORE) / decoding,
        "planned": planned,
        "peak": None if worker.args.cpu else max(peaks),
        "card": None if worker.args.cpu else max(cards),
        "answer": answer,
    }


def taken(worker: Worker) -> int | None:
    """Bytes of the card that are not free, whoever has them."""
    if worker.args.cpu:
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


WORK = {"data": data, "together": together, "single": single, "longest": longest}


# -- tables ----------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What processes have left, by their name and part."""

    folder: Path

    def get(self, name: Any, what: str) -> Any:
        file = self.folder / f"{name}.{what}.json"
        return json.loads(file.read_text()) if file.exists() else None


def tables(args: argparse.Namespace, folder: Path) -> None:
    found, shape = Found(folder), args.shape.upper()
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)

    def show(name: str, title: str, rows: list[Row]) -> None:
        if rows:
            path = None if args.output is None else args.output / f"scaling-{name}.json"
            report(title, rows, environment(), path)

    length = format_length(args.length)
    prompts = f"{args.depths} depths x {args.samples} samples of {length}"
    groups = args.context_parallel
    parallel = "Data parallel" if groups == 1 else f"Groups of {groups} together"
    show("needles", f"{parallel}, {shape}: needles, {prompts}", of_data(args, found, "needles"))
    title = f"{parallel}, {shape}: {args.questions} questions with {ANSWERS} answers"
    show("choices", title, of_data(args, found, "choices"))
    for what, tokens in (("together", length), ("longest", format_length(args.longest))):
        title = f"Context parallel, {shape}: one text of {tokens} on all GPUs"
        show(what, title, of_one_text(args, found, what))
    title = f"One process of {shape}: {args.depths * args.samples} prompts of "
    title += f"{format_length(min(args.length, MODERATE))}, and {args.questions} questions"
    show("single", title, of_turns(args, found))


def of_data(args: argparse.Namespace, found: Found, kind: str) -> list[Row]:
    rows: list[Row] = []
    one = found.get(1, kind)
    for gpus in args.gpus:
        now = found.get(gpus, kind)
        if now is None:
            continue
        row: Row = {"GPUs": gpus, "s": now["seconds"]}
        row["of linear"] = one and one["seconds"] / gpus / now["seconds"]
        row |= {"engine s": now["engine"], "busiest / mean": now["spread"]}
        row["texts s"] = now["texts"]
        row["other answers"] = one and differing(kind, one["answers"], now["answers"])
        rows.append(row | {"loading s": found.get(gpus, "loading")["seconds"]})
    return rows


def differing(kind: str, some: Sequence[Any], others: Sequence[Any]) -> int:
    """Documents answered differently: other texts, or other choices."""
    if kind == "needles":
        return sum(a != b for a, b in zip(some, others, strict=True))
    choices = [[np.argmax([p for p, _ in answer]) for answer in both] for both in (some, others)]
    return sum(int(a != b) for a, b in zip(*choices, strict=True))


def of_one_text(args: argparse.Namespace, found: Found, what: str) -> list[Row]:
    rows: list[Row] = []
    one = found.get(1, what)
    for gpus in args.gpus:
        now = found.get(gpus, what)
        if now is None:
            continue
        row: Row = {"GPUs": gpus, "prefill s": now["prefill"]}
        if one is not None:
            row["faster"] = one["prefill"] / now["prefill"]
        row["tokens/s"] = now["speed"]
        if one is not None:
            row["times"] = now["speed"] / one["speed"]
        peak, card = now["peak"], now["card"]
        row |= {"peak GiB": peak and peak / GIB, "planned": now["planned"] / GIB}
        row |= {"ratio": peak and peak / now["planned"], "card GiB": card and card / GIB}
        rows.append(row)
    return rows


def of_turns(args: argparse.Namespace, found: Found) -> list[Row]:
    rows: list[Row] = []
    for kind in ("needles", "choices"):
        times: dict[str, list[float]] = {}
        for name in ("plain", "torchrun"):
            turns = [found.get(name, f"single{turn}") for turn in range(args.turns)]
            times[name] = [turn[kind] for turn in turns if turn is not None]
        if all(times.values()):
            plain, torchrun = (median(times[name]) for name in ("plain", "torchrun"))
            rows.append(
                {"": kind, "s": plain, "under torchrun s": torchrun, "ratio": torchrun / plain}
            )
    return rows


if __name__ == "__main__":
    sys.exit(main())
