"""Damages files, drives the project with them as users would, and counts what goes wrong.

    python tests/faults/fuzz.py --cases 5000

A case is a few of the files of `made_files`, one or two of them changed by `mutations`, and one
command or evaluation that reads them. It passes if that works, or ends in one harmless line of
error. Cases are numbered: the seed and the number make the case, wherever and whenever it is run.
They run in forks of one process that has imported everything, which are watched from outside.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import faulthandler
import io
import json
import logging
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
for folder in (Path(__file__).parent, Path(__file__).parents[1] / "reports"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from lm_eval.api.instance import Instance  # noqa: E402
from made_files import files_below, make_files  # noqa: E402
from mutations import SCRIPT, SENTINEL, mutate  # noqa: E402

from yoco_eval import convert, estimate, profiling  # noqa: E402, F401
from yoco_eval.cli import main as yoco_eval  # noqa: E402
from yoco_eval.garbage import collecting_new_only  # noqa: E402
from yoco_eval.lm import YocoLM  # noqa: E402
from yoco_eval.reports import comparison_files, heatmap  # noqa: E402, F401

HANG = 20.0  # seconds
MEMORY = 4 << 30  # bytes
_BATCH = 100  # cases of one fork
_LONGEST = 2000  # characters of a line of error: a screenful
_FAULTS = ("traceback", "hang", "memory", "executed", "unclean")
_STARTED = "started"
_ONE_LAYOUT = ("gemma", "phi4flash")  # checkpoints of families that are not converted
_NAMES = {
    "accepted": "accepted", "refused": "refused in one line", "traceback": "tracebacks",
    "hang": f"hangs over {HANG:.0f} s", "memory": f"over {MEMORY >> 30} GiB",
    "executed": "code executed", "unclean": "unclean output",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Of a case.

    verdict: "accepted" or "refused", or one of `_FAULTS`; or, at first, `_STARTED`.
    what: the command and the files that were changed.
    detail: what was said.
    """

    case: int
    verdict: str
    what: str = ""
    detail: str = ""
    seconds: float = 0.0

    @property
    def is_fault(self) -> bool:
        return self.verdict in _FAULTS


class _Unclean(Exception):
    """Output that misleads or harms: NaN, escapes, formulas, scripts, or an endless line."""


def run_cases(seed: int, cases: range) -> Iterator[Outcome]:
    """The outcomes of the cases, in order."""
    with tempfile.TemporaryDirectory(prefix="yoco-faults-") as folder:
        files = Path(folder, "files")
        make_files(files)
        _warm_up(files, Path(folder, "warm"))
        case, end = cases.start, cases.stop
        with collecting_new_only():  # or each fork would copy the heap as soon as it collects
            while case < end:
                batch = range(case, min(case + _BATCH, end))
                for outcome in _forked(seed, batch, files, Path(folder)):
                    yield outcome
                    case = outcome.case + 1


def _forked(seed: int, cases: range, files: Path, folder: Path) -> Iterator[Outcome]:
    """The outcomes of the cases up to the first that ends the fork which they run in."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            _child(seed, cases, files, folder, write)
        finally:
            os._exit(0)
    os.close(write)
    case, what, started, rest = cases.start, "", 0.0, b""
    try:
        while case < cases.stop:
            if not select.select([read], [], [], HANG)[0]:
                if _is_starved(child, started):
                    continue
                os.kill(child, signal.SIGUSR1)  # tells on stderr where it hangs
                time.sleep(0.5)
                yield Outcome(case, "hang", what, seconds=HANG)
                return
            block = os.read(read, 1 << 16)
            if not block:
                _, status = os.waitpid(child, 0)
                child = 0
                yield Outcome(case, "traceback", what, f"the process died, status {status}")
                return
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                outcome = Outcome(**json.loads(line))
                if outcome.verdict == _STARTED:
                    what, started = outcome.what, _processor_seconds(child)
                    continue
                case, what = outcome.case + 1, ""
                yield outcome
                if outcome.is_fault:  # which may have left anything behind
                    return
    finally:
        os.close(read)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _child(seed: int, cases: range, files: Path, folder: Path, pipe: int) -> None:
    faulthandler.register(signal.SIGUSR1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    # A guard for the machine; what takes more than MEMORY, but less than this, is reported.
    limit = 2 * MEMORY + _address_space()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def tell(outcome: Outcome) -> None:
        os.write(pipe, json.dumps(vars(outcome)).encode() + b"\n")

    for case in cases:
        outcome = run_case(seed, case, files, folder / f"case-{os.getpid()}", tell)
        tell(outcome)
        if outcome.is_fault:
            return


def _is_starved(process: int, started: float) -> bool:
    """Whether it waits for nothing but a processor, of which it has not had its seconds yet."""
    state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "R" and _processor_seconds(process) - started < HANG


def _processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run_case(
    seed: int, case: int, files: Path, folder: Path, tell: Callable[[Outcome], None]
) -> Outcome:
    """Runs one case in this process, in the new folder `folder`, which is removed.

    tell: is told what the case is before it starts.
    """
    folder.mkdir()
    here, start, what, detail = os.getcwd(), time.perf_counter(), "", ""
    try:
        os.chdir(folder)
        what, run = _prepare(seed, case, files, folder)
        tell(Outcome(case, _STARTED, what))
        with _captured(Random(f"encoding/{seed}/{case}")) as output:
            verdict = run()
        detail = output()
        _check_text(detail)
    except _Unclean as error:
        verdict, detail = "unclean", f"{error}\n{detail}"
    except BaseException:  # a panic of a library's is no Exception
        verdict, detail = "traceback", traceback.format_exc()[-3000:]
    finally:
        os.chdir(here)
    if Path(folder, SENTINEL).exists():
        verdict = "executed"
    elif resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 > MEMORY:
        verdict = "memory"
    shutil.rmtree(folder, ignore_errors=True)
    return Outcome(case, verdict, what, detail, time.perf_counter() - start)


def _prepare(seed: int, case: int, files: Path, folder: Path) -> tuple[str, Callable[[], str]]:
    """What the case is, in words, and what runs it."""
    rng = Random(f"{seed}/{case}")
    group = rng.choice(
        ("checkpoints", "checkpoints", "tokenizers", "tokenizers", "results", "results", "profiles")
    )
    if group in ("checkpoints", "tokenizers"):
        source = rng.choice(sorted((files / group).iterdir()))
        copy = Path(shutil.copytree(source, folder / source.name))
        weights = [file for file in files_below(copy) if not file.name.startswith("token")]
        damaged = rng.sample(weights if group == "checkpoints" else files_below(copy), 1)
        run = _load(rng, copy, group, files)
    else:
        copy = Path(shutil.copytree(files / group, folder / group))
        found = files_below(copy)
        damaged = rng.sample(found, min(len(found), rng.choice((1, 1, 2))))
        run = _report(rng, copy) if group == "results" else _profile(rng, damaged[0])
    for file in damaged:
        mutate(file, rng)
    words, function = run
    return f"{words} ({', '.join(str(file.relative_to(folder)) for file in damaged)})", function


Run = tuple[str, Callable[[], str]]


def _load(rng: Random, copy: Path, group: str, files: Path) -> Run:
    """A checkpoint or a tokenizer is evaluated, converted or planned for."""
    kind = rng.choice(("evaluate", "evaluate", "convert", "plan"))
    if group == "checkpoints":
        checkpoint, tokenizer = copy, None
    else:
        checkpoint, tokenizer = files / "checkpoints" / "published-retention-zip", copy
        if models := sorted(copy.glob("*.model")):
            tokenizer = rng.choice(models)
        kind = "convert" if kind == "plan" else kind
    if kind == "evaluate":
        return f"evaluate {checkpoint} {tokenizer}", lambda: _evaluate(checkpoint, tokenizer)
    if kind == "plan":
        of = rng.choice(("--pretrained", "--shape"))
        return _command("plan", of, checkpoint, "--length", "1k", "--device", "cpu")
    options = ("--tokenizer", tokenizer) if tokenizer else ()
    return _command("convert", checkpoint, "converted", *options)


def _evaluate(checkpoint: Path, tokenizer: Path | None) -> str:
    """As lm-eval does it: the model is made, scores texts and generates one."""
    try:
        model = YocoLM(
            pretrained=str(checkpoint), tokenizer=tokenizer and str(tokenizer), device="cpu"
        )
        arguments = [("the thing", " in there"), ("", "\u00e9\ud7ff x")]
        scores = model.loglikelihood(_instances("loglikelihood", arguments), disable_tqdm=True)
        settings = {"until": ["\n"], "max_gen_toks": 4}
        texts = model.generate_until(_instances("generate_until", [("in", settings)]), True)
        if model.tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": "the"}]
            model.generate_until(
                _instances(
                    "generate_until", [(model.apply_chat_template(messages), {"max_gen_toks": 1})]
                ),
                True,
            )
    except ValueError as error:  # what lm-eval shows of it is its last line
        _check_error(str(error))
        print(error, file=sys.stderr)
        return "refused"
    if any(logprob != logprob or logprob > 0 for logprob, _ in scores):
        raise _Unclean(f"scores {scores}")
    assert all(isinstance(text, str) for text in texts)
    return "accepted"


def _instances(kind: str, arguments: list) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def _report(rng: Random, copy: Path) -> Run:
    early, late = copy / "early", copy / "late"
    suffix = rng.choices((".json", ".csv", ".md", ".tex", ".html"), (4, 4, 4, 4, 1))[0]
    if rng.random() < 0.4:
        options = rng.choice(((), (), ("-o", f"out{rng.choice(('.csv', '.csv', '.svg'))}")))
        return _command("heatmap", rng.choice((early, early / "needles")), *options)
    return _command("compare", early, late, "-o", f"out{suffix}")


def _profile(rng: Random, file: Path) -> Run:
    suffix = rng.choice((".json", ".json", ".json", ".svg"))
    return _command("profile", "--read", file, "-o", f"out{suffix}")


def _command(*arguments: str | Path) -> Run:
    words = [str(argument) for argument in arguments]

    def run() -> str:
        code = yoco_eval(words)
        if code == 2:
            return "refused"
        for file in Path().glob("out.*"):
            _check_file(file)
        return "accepted"

    return " ".join(("yoco-eval", *words)), run


@contextlib.contextmanager
def _captured(rng: Random) -> Iterator[Callable[[], str]]:
    """Standard streams as a terminal's; the value tells afterwards what was written to them."""
    buffer = io.BytesIO()
    encoding = rng.choice(("utf-8", "utf-8", "ascii"))
    out = io.TextIOWrapper(buffer, encoding, write_through=True)
    err = io.TextIOWrapper(buffer, encoding, errors="backslashreplace", write_through=True)
    # Notes go to stderr, by the command line's handler or, else, by logging's last resort.
    logging.getLogger("yoco_eval").propagate = False
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield lambda: buffer.getvalue().decode(encoding)
        finally:
            for stream in (out, err):  # or the buffer would be closed with them
                stream.detach()


def _check_error(text: str) -> None:
    if not text.strip() or len(text.splitlines()) != 1:
        raise _Unclean(f"an error of {len(text.splitlines())} lines: {text[:3000]}")


def _check_text(text: str) -> None:
    lines = text.splitlines()
    if any(not c.isprintable() for line in text.split("\n") for c in line):
        raise _Unclean("control characters")
    if any(len(line) > _LONGEST for line in lines):
        raise _Unclean(f"a line of {max(map(len, lines))} characters")


def _check_file(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        json.loads(text, parse_constant=_no_constant)
    elif file.suffix == ".csv":
        for row in csv.reader(io.StringIO(text)):
            for cell in row:
                if cell[:1] in ("=", "+", "-", "@") and not _is_number(cell):
                    raise _Unclean(f"a formula in a .csv: {cell[:100]}")
    if file.suffix in (".html", ".svg", ".md") and SCRIPT in text:
        raise _Unclean(f"a script in a {file.suffix}")


def _no_constant(name: str) -> None:
    raise _Unclean(f"{name} in JSON")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _warm_up(files: Path, folder: Path) -> None:
    """Has everything imported; whole files are accepted, whatever reads them."""
    # The device's speed is soon measured; no case tells anything of it.
    estimate._SECONDS, estimate._COPY = 0.0, {"cpu": 1 << 16}
    folder.mkdir()
    here = os.getcwd()
    os.chdir(folder)
    try:
        with _captured(Random(0)) as output:
            results, tokenizers = files / "results", files / "tokenizers"
            early, late = results / "early", results / "late"
            outputs = [f"-oout{suffix}" for suffix in (".json", ".csv", ".md", ".html", ".tex")]
            runs = [
                _command("compare", early, late, *outputs),
                _command("heatmap", early, "-o", "out.svg"),
                _command("heatmap", early),
                _command("profile", "--read", early / "profile.json", "-o", "out.svg"),
            ]
            for checkpoint in sorted((files / "checkpoints").iterdir()):
                if not checkpoint.name.startswith(_ONE_LAYOUT):
                    runs.append(_command("convert", checkpoint, checkpoint.name))
                runs.append(_command("plan", "--pretrained", checkpoint, "--length", "1k"))
            chosen = [tokenizers / "json", tokenizers / "tiktoken"]
            for tokenizer in chosen + sorted((tokenizers / "sentencepiece").iterdir()):
                runs.append(("evaluate", lambda kind=tokenizer: _evaluate(checkpoint, kind)))
            for words, run in runs:
                if run() != "accepted":
                    raise RuntimeError(f"{words}: undamaged files are refused: {output()}")
    finally:
        os.chdir(here)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=600, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: %(default)s)")
    parser.add_argument("--case", type=int, help="run this case alone, and show what it says")
    args = parser.parse_args()
    cases = range(args.cases) if args.case is None else range(args.case, args.case + 1)
    start, verdicts, slowest = time.perf_counter(), Counter(), 0.0
    for outcome in run_cases(args.seed, cases):
        verdicts[outcome.verdict] += 1
        slowest = max(slowest, outcome.seconds)
        if outcome.is_fault or args.case is not None:
            print(report(args.seed, outcome), flush=True)
    print(summary(verdicts))
    print(f"slowest {slowest:.1f} s; {time.perf_counter() - start:.0f} s in all")
    return int(any(verdicts[fault] for fault in _FAULTS))


def report(seed: int, outcome: Outcome) -> str:
    """What went wrong, and how to see it again."""
    return (
        f"case {outcome.case}: {_NAMES[outcome.verdict]}: {outcome.what}\n{outcome.detail}\n"
        f"again: python tests/faults/fuzz.py --seed {seed} --case {outcome.case}\n"
    )


def summary(verdicts: Counter) -> str:
    """The figures, in one line."""
    parts = [f"{sum(verdicts.values())} cases"]
    return ", ".join(parts + [f"{verdicts[key]} {name}" for key, name in _NAMES.items()])


if __name__ == "__main__":
    sys.exit(main())
