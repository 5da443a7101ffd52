"""The command line, `yoco-eval`: reports of lm-eval's results, costs, checkpoints converted."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from yoco_eval import __version__
from yoco_eval.devices import CACHE_DTYPES, DTYPES
from yoco_eval.lengths import as_argument, parse_length, parse_lengths
from yoco_eval.printable import PLAIN, message, with_settings
from yoco_eval.sizes import parse_blocks, parse_count, parse_memory, parse_speeds

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from yoco_eval.estimate import Card
    from yoco_eval.model import Costs
    from yoco_eval.reports.profile import Profile

# Heavy modules (torch, matplotlib, lm_eval) are imported by the subcommand that needs them.

_SHAPES = (
    "this size: 1.6b, 3b, 7b, 13b, or fla-1.3b-gdn, flash-linear-attention's default; or of the "
    "configuration in a config.json or params.json, given by its path or its folder's"
)


class UserError(Exception):
    """What the user can mend; its message is shown, without a traceback."""


class _Parser(argparse.ArgumentParser):
    def error(self, text: str) -> NoReturn:
        super().error(message(text))


class _Note(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"yoco-eval: {message(super().format(record))}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (default: sys.argv) and returns its exit code.

    0: done. 1: a plan does not fit. 2: an error of the user's, told in one line on stderr. 130:
    interrupted. 141: nobody reads what is printed any more.
    """
    args = _parser().parse_args(argv)
    with _notes(), _any_encoding(sys.stdout):
        try:
            code = args.run(args) or 0
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            _drop_output()
            return 141
        except (UserError, OSError) as error:
            _note(f"error: {error}")
            _drop_output()
            return 2
        except KeyboardInterrupt:
            return 130


@contextmanager
def _notes() -> Iterator[None]:
    """Shows what the project logs."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Note())
    logger = logging.getLogger("yoco_eval")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _any_encoding(stream: TextIO) -> Iterator[None]:
    """Letters that the stream's encoding lacks are printed as similar ones."""
    errors = getattr(stream, "errors", None)
    if not isinstance(stream, io.TextIOWrapper) or errors not in ("strict", "surrogateescape"):
        yield
        return
    stream.reconfigure(errors=PLAIN)
    try:
        yield
    finally:
        stream.reconfigure(errors=errors)


def _drop_output() -> None:
    """Forgets what cannot be printed: Python would try again, and complain, when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _console() -> Console:
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> NoReturn:
            raise  # instead of ending here, with files yet to be written

    return Output(highlight=False)


def _print(text: str) -> None:
    print(message(text))


def _note(text: str) -> None:
    """To those who watch, not to those who read the output."""
    print(f"yoco-eval: {message(text)}", file=sys.stderr)


def _all_of(actions: Iterable[Callable[[], object]]) -> None:
    """Does each of them, also where another fails. Raises UserError, telling of all that failed."""
    errors: list[Exception] = []
    for action in actions:
        try:
            action()
        except (OSError, ValueError) as error:
            errors.append(error)
    told = [str(error) for error in errors if not isinstance(error, BrokenPipeError)]
    if told:
        raise UserError("; ".join(dict.fromkeys(told)))
    if errors:
        raise errors[0]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds; write 120")
    return seconds


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share below 1; write 0.9")
    return share


def _heatmap(args: argparse.Namespace) -> None:
    from yoco_eval.reports.heatmap import check_output, print_heatmap, save_heatmap
    from yoco_eval.reports.results import ResultsError
    from yoco_eval.reports.runs import load_needle_run

    try:
        if args.output:
            check_output(args.output)
        run = load_needle_run(args.results, args.task)
        if args.output:
            save_heatmap(run, args.output, args.title)
            _print(f"wrote {args.output}")
            return
    except ResultsError as error:
        raise UserError(error) from error

    print_heatmap(run, _console(), args.title)


def _compare(args: argparse.Namespace) -> None:
    from yoco_eval.reports.comparison import compare
    from yoco_eval.reports.comparison_files import check_output, save_comparison
    from yoco_eval.reports.comparison_text import print_comparison
    from yoco_eval.reports.results import ResultsError
    from yoco_eval.reports.runs import load_checkpoints

    names = [name.strip() for name in args.names.split(",")] if args.names is not None else None
    try:
        for path in args.output:
            check_output(path)
        checkpoints = load_checkpoints(args.results, names)
        comparison = compare(checkpoints, args.threshold, args.published, args.order)
    except ResultsError as error:
        raise UserError(error) from error

    def save(path: Path) -> None:
        save_comparison(comparison, path)
        _print(f"wrote {path}")

    show = partial(print_comparison, comparison, _console())
    if args.published and not comparison.has_published:
        _note("nothing was published of these tasks")
    _all_of([show, *(partial(save, path) for path in args.output)])


def _convert(args: argparse.Namespace) -> None:
    from yoco_eval.convert import convert
    from yoco_eval.model.checkpoint import CheckpointError
    from yoco_eval.tokenizers import TokenizerError

    try:
        convert(
            args.source,
            args.destination,
            tokenizer=args.tokenizer,
            max_length=args.max_length,
            dtype=args.dtype,
            revision=args.revision,
        )
    except (CheckpointError, TokenizerError) as error:
        raise UserError(error) from error
    _print(f"wrote {args.destination}")


def _profile(args: argparse.Namespace) -> int:
    from yoco_eval.reports.profile import load_profile, print_profile
    from yoco_eval.reports.profile_files import check_output, save_profile
    from yoco_eval.reports.results import ResultsError

    try:
        for path in args.output:
            check_output(path)
        if args.read:
            _check_measures_nothing(args)
            profile, code = load_profile(args.read), 0
        else:
            _check_revision(args)
            profile, code = _measure_profile(args)
    except ResultsError as error:
        raise UserError(error) from error

    def save(path: Path) -> None:
        save_profile(profile, path)
        _print(f"wrote {path}")

    saves = [partial(save, path) for path in args.output]
    _all_of([lambda: print_profile(profile, _console()), *saves])
    return code


def _plan(args: argparse.Namespace) -> int:
    from yoco_eval.devices import check_cache_dtype, find_dtype
    from yoco_eval.estimate import estimate, print_estimate
    from yoco_eval.layouts import Cluster, lay_out, print_layouts
    from yoco_eval.model import open_checkpoint
    from yoco_eval.model.families import with_eight_bits, with_sparse
    from yoco_eval.model.shapes import find_shape, with_random_weights

    try:
        _check_revision(args)
        device = _planned_device(args)
        dtype = find_dtype(args.dtype, device)
        blueprint = (
            with_random_weights(find_shape(args.shape))
            if args.shape is not None
            else open_checkpoint(args.pretrained, args.revision)
        )
        if args.sparse is not None:
            blueprint = with_sparse(blueprint, args.sparse, f"--sparse {args.sparse}")
        if args.cache_dtype is not None:
            option = f"--cache-dtype {args.cache_dtype}"
            if args.memory is None:  # else the card is not there
                check_cache_dtype(args.cache_dtype, device, option)
            blueprint = with_eight_bits(blueprint, option)
        card = _planned_card(args, blueprint.costs, dtype, device)
    except ValueError as error:
        raise UserError(error) from error
    name = with_settings(
        args.pretrained if args.shape is None else args.shape,
        revision=args.revision or None,
        sparse=args.sparse,
        cache_dtype=args.cache_dtype,
    )
    positions = blueprint.config.max_position_embeddings
    cluster = Cluster(args.nodes, args.gpus, card)
    if cluster.size == 1:
        result = estimate(blueprint.costs, dtype, card, args.length, args.prefill_chunk)
        print_estimate(result, name, dtype, _console(), positions)
        if args.cache_dtype is not None and device.type == "cpu":
            _print("On a CPU, numbers of eight bits are converted first, and decoding is slower.")
        return 0 if result.fit.fits else 1
    layouts = lay_out(blueprint, dtype, cluster, args.length, args.prefill_chunk)
    print_layouts(layouts, name, dtype, _console(), positions)
    return 0 if layouts.best else 1


def _planned_device(args: argparse.Namespace) -> torch.device:
    """That of a plan, or a GPU that is not there. Raises ValueError where options disagree."""
    import torch

    from yoco_eval.devices import find_device

    if args.memory is not None:
        if args.device != "auto":
            raise ValueError(
                f"--memory is of cards that are not there, and --device {args.device} is; leave "
                "one of them out"
            )
        return torch.device("cuda")
    if args.speeds is not None:
        raise ValueError("--speeds is of cards that are not there; say their --memory, too")
    device = find_device(args.device)
    if args.nodes * args.gpus > 1 and device.type != "cuda":
        raise ValueError(
            f"--gpus and --nodes are of cards like the one that is there, and {device} is none; "
            "say how much memory they have with --memory, such as 80g"
        )
    return device


def _planned_card(
    args: argparse.Namespace, costs: Costs, dtype: torch.dtype, device: torch.device
) -> Card:
    from yoco_eval.estimate import absent_card, present_card
    from yoco_eval.speeds import Speeds

    if args.memory is None:
        return present_card(
            costs, dtype, device, min(args.length, args.prefill_chunk or args.length)
        )
    return absent_card(args.memory, None if args.speeds is None else Speeds(*args.speeds))


def _check_revision(args: argparse.Namespace) -> None:
    if args.revision and not args.pretrained:
        raise UserError("--revision is of a checkpoint on the hub; name it with --pretrained")


def _check_measures_nothing(args: argparse.Namespace) -> None:
    alone = vars(_parser().parse_args(["profile", f"--read={args.read}"]))
    given = [n for n, value in vars(args).items() if n != "output" and value != alone[n]]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"--read measures nothing; leave out {options}")


def _measure_profile(args: argparse.Namespace) -> tuple[Profile, int]:
    """What was measured, which is saved row by row; and the exit code, 130 if that is not all."""
    from yoco_eval.model.checkpoint import CheckpointError
    from yoco_eval.profiling import ProfileError, run_profile
    from yoco_eval.reports.profile import describe_row
    from yoco_eval.reports.profile_files import save_profile
    from yoco_eval.reports.results import ResultsError

    measured: Profile | None = None

    def keep(profile: Profile) -> None:
        nonlocal measured
        measured = profile
        _note(describe_row(profile.rows[-1]))
        for path in args.output:
            try:
                save_profile(profile, path)
            except ResultsError as error:  # no reason to lose the rows that follow
                _note(str(error))

    try:
        profile = run_profile(
            args.lengths,
            shape=args.shape,
            pretrained=args.pretrained,
            revision=args.revision,
            sparse=args.sparse,
            cache_dtype=args.cache_dtype,
            against=args.against,
            patience=args.patience,
            dtype=args.dtype,
            device=args.device,
            report=keep,
        )
        return profile, 0
    except (ProfileError, CheckpointError) as error:
        raise UserError(error) from error
    except KeyboardInterrupt:
        if measured is None:
            raise
        return measured, 130


def _parser() -> _Parser:
    parser = _Parser(
        prog="yoco-eval",
        description="Reports of lm-eval's results, the cost of long contexts, and checkpoints of\n"
        "YOCO models converted.",
        epilog="The evaluation itself is lm-eval's:\n"
        "  lm_eval --model yoco --tasks yoco_needle ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"yoco-eval {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    heatmap = _command(
        commands,
        "heatmap",
        "draw needle results: accuracy by context length and depth",
        """
  lm_eval --model yoco --tasks yoco_needle --output_path results/
  yoco-eval heatmap results/                  in the terminal
  yoco-eval heatmap results/ -o needle.png    as a figure; .csv for the numbers""",
    )
    heatmap.add_argument(
        "results",
        metavar="RESULTS",
        help="what lm_eval got as --output_path, a folder in it, or one results file; several "
        "runs of a model in one setup are drawn as one grid",
    )
    heatmap.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write to this .png, .svg, .pdf or .csv file instead of the terminal",
    )
    heatmap.add_argument("--task", metavar="NAME", help="which task, where a run has several")
    heatmap.add_argument("--title", metavar="TEXT", help="a title in place of the model's name")
    heatmap.set_defaults(run=_heatmap)

    compare = _command(
        commands,
        "compare",
        "tell which of several checkpoints is better, where, and how sure that is",
        """
  yoco-eval compare results/4k results/64k results/1m -o extension.html
  yoco-eval compare results/a results/b --names base,tuned -o tuned.pdf
  yoco-eval compare results/step-* --order step -o run.html
  yoco-eval compare results/1m --published -o page.html -o card.md

Tests are made prompt by prompt where runs share their prompts, and corrected
for their number; a difference is told only if significant at the 5 % level.""",
    )
    compare.add_argument(
        "results",
        nargs="+",
        metavar="RESULTS",
        help="for each checkpoint, from the earliest to the latest, what lm_eval got as "
        "--output_path; of every task the newest results count, joined by those of the same "
        "setup, but for the number of samples, at other context lengths; a .json file of "
        "yoco-eval profile may stand beside them",
    )
    compare.add_argument(
        "--names",
        metavar="NAME,NAME,...",
        help="what to call the checkpoints (default: as their folders)",
    )
    compare.add_argument(
        "--order",
        choices=("given", "step"),
        help="draw effective context lengths against the stage of training: as given here, or by "
        "the step that a number in each name tells, such as step-4000 (default: as given, and "
        "drawn of more than 4)",
    )
    compare.add_argument(
        "--published",
        action="store_true",
        help="set the published figures of the same tasks beside the measured ones",
    )
    compare.add_argument(
        "--threshold",
        type=_share,
        default=0.9,
        metavar="X",
        help="effective context length: the longest at which, and at all shorter ones, the "
        "accuracy is above X with 95 %% confidence (default: %(default)s)",
    )
    _add_output(
        compare,
        ".html, .png, .svg, .pdf, .md, .tex, .csv or .json",
        "; card.md is a block for a model card",
    )
    compare.set_defaults(run=_compare)

    convert = _command(
        commands,
        "convert",
        "write a checkpoint, tokenizer included, as a Hugging Face-style folder",
        """
  yoco-eval convert YOCO-3B-1M/ yoco-3b-1m/
  yoco-eval convert train/checkpoint_last.pt mine/ --tokenizer tokenizer.model
  lm_eval --model yoco --model_args pretrained=mine --tasks yoco_needle""",
    )
    convert.add_argument(
        "source",
        metavar="SRC",
        help="a folder with params.json and checkpoint.pth, a fairseq training checkpoint, a "
        "folder of flash-linear-attention's or of this command's, the name of a bundled "
        "checkpoint, or one on the hub, org/name",
    )
    convert.add_argument("destination", metavar="DST", help="the folder to write")
    _add_revision(convert, "SRC")
    convert.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a folder, tokenizer.json, SentencePiece *.model, *.tiktoken, tekken.json, "
        "cl100k_base, o200k_base, or a name on the hub (default: the checkpoint's own)",
    )
    convert.add_argument(
        "--max-length",
        type=as_argument(parse_length),
        metavar="N",
        help="the longest context the checkpoint is meant for, in tokens: 65536, 64k, 1m "
        "(default: what it says)",
    )
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="store the weights so (default: as they are)",
    )
    convert.set_defaults(run=_convert)

    plan = _command(
        commands,
        "plan",
        "estimate the memory and time that a run takes, without running it",
        """
  yoco-eval plan --shape 3b --length 1m
  yoco-eval plan --pretrained yoco-3b-1m/ --length 256k --device cuda:1
  yoco-eval plan --shape 3b --length 10m --gpus 8
  yoco-eval plan --shape 13b --length 10m --nodes 4 --gpus 8 --memory 80g""",
    )
    what = plan.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", metavar="NAME", help=f"a model of {_SHAPES}")
    what.add_argument(
        "--pretrained",
        metavar="DIR",
        help="a checkpoint, of which the configuration is read; or the name of a bundled one, or "
        "of one on the hub, org/name",
    )
    _add_revision(plan, "--pretrained")
    plan.add_argument(
        "--length",
        type=as_argument(parse_length),
        required=True,
        metavar="N",
        help="tokens of the longest text with its answer, such as 64k or 1m",
    )
    plan.add_argument(
        "--prefill-chunk",
        type=as_argument(parse_length),
        metavar="N",
        help="tokens fed at a time (default: as many as pay and fit)",
    )
    plan.add_argument(
        "--gpus",
        type=as_argument(parse_count),
        default=1,
        metavar="N",
        help="plan for N cards alike: texts of their own for each, or texts that several hold "
        "together (context_parallel)",
    )
    plan.add_argument(
        "--nodes",
        type=as_argument(parse_count),
        default=1,
        metavar="N",
        help="of N machines, with --gpus cards each",
    )
    plan.add_argument(
        "--memory",
        type=as_argument(parse_memory),
        metavar="SIZE",
        help="of each card, where they are not there (default: they are like the one that is): "
        "80g, for 80 GiB",
    )
    plan.add_argument(
        "--speeds",
        type=as_argument(parse_speeds),
        metavar="X,Y",
        help="of cards that are not there, what they reach: TFLOP/s of matrix products and GB/s "
        "of memory, such as 700,2900 (default: operations and bytes in place of times)",
    )
    _add_cache(plan)
    _add_where(plan)
    plan.set_defaults(run=_plan)

    profile = _command(
        commands,
        "profile",
        "measure memory, prefill time, decode speed and throughput by context length",
        """
  yoco-eval profile --shape 3b --lengths 32k,64k,...,1m --against transformer
  yoco-eval profile --pretrained yoco-3b-1m/ -o profile.json -o profile.png
  yoco-eval profile --read profile.json -o profile.svg""",
    )
    what = profile.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", metavar="NAME", help=f"a model with random weights of {_SHAPES}")
    what.add_argument(
        "--pretrained",
        metavar="DIR",
        help="a checkpoint, or the name of a bundled one, such as demo-64k, or of one on the hub, "
        "org/name",
    )
    what.add_argument(
        "--read", metavar="FILE", help="measure nothing, show the .json file of an earlier profile"
    )
    _add_revision(profile, "--pretrained")
    profile.add_argument(
        "--lengths",
        type=as_argument(parse_lengths),
        default="32k,64k,...,1m",
        metavar="N,N,...",
        help="context lengths in tokens; '...' doubles up to the next (default: %(default)s)",
    )
    profile.add_argument(
        "--against",
        choices=("transformer",),
        help="compare with a Transformer of the same size and random weights",
    )
    profile.add_argument(
        "--patience",
        type=_seconds,
        default=120.0,
        metavar="S",
        help="give up a length whose prefill takes more seconds than this, and a batch that "
        "decodes for longer (default: 120)",
    )
    _add_cache(profile)
    _add_where(profile)
    _add_output(profile, ".json, .png, .svg or .pdf")
    profile.set_defaults(run=_profile)
    return parser


def _add_output(command: argparse.ArgumentParser, suffixes: str, more: str = "") -> None:
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help=f"also write to this {suffixes} file{more}; may be given several times",
    )


def _add_revision(command: argparse.ArgumentParser, of: str) -> None:
    command.add_argument(
        "--revision",
        metavar="NAME",
        help=f"branch, tag or commit of {of} on the hub (default: its main branch)",
    )


def _add_cache(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--sparse",
        type=as_argument(parse_blocks),
        metavar="K",
        help="each token chooses K blocks of 64 tokens to read, as with --model_args sparse=K "
        "(default: it reads all)",
    )
    command.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        help="keys and values in eight bits, as with --model_args cache_dtype=fp8 (default: in the "
        "model's dtype)",
    )


def _add_where(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: bfloat16 on a GPU, float32 elsewhere",
    )
    command.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="such as cuda:1 (default: the first GPU if there is one, else the CPU)",
    )


def _command(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
