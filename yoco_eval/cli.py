"""The command line, `yoco-eval`: reports of lm-eval's results, and checkpoints converted."""

import argparse
import logging
import sys
from pathlib import Path

from yoco_eval import __version__
from yoco_eval.lengths import parse_length

# Heavy modules (torch, matplotlib, lm_eval) are imported by the subcommand that needs them.


class UserError(Exception):
    """What the user can mend; its message is shown, without a traceback."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (default: sys.argv) and returns its exit code.

    0: done. 2: an error of the user's, told in one line on stderr. 130: interrupted.
    """
    args = _parser().parse_args(argv)
    notes = logging.StreamHandler()
    notes.setFormatter(logging.Formatter("yoco-eval: %(message)s"))
    logger = logging.getLogger("yoco_eval")
    logger.addHandler(notes)
    try:
        args.run(args)
    except (UserError, OSError) as error:
        print(f"yoco-eval: error: {'; '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        logger.removeHandler(notes)
    return 0


def _length(text: str) -> int:
    try:
        return parse_length(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _heatmap(args: argparse.Namespace) -> None:
    from yoco_eval.reports.heatmap import check_output, print_heatmap, save_heatmap
    from yoco_eval.reports.results import ResultsError, load_needle_run

    try:
        if args.output:
            check_output(args.output)
        run = load_needle_run(args.results, args.task)
        if args.output:
            save_heatmap(run, args.output, args.title)
            print(f"wrote {args.output}")
            return
    except ResultsError as error:
        raise UserError(error) from error

    from rich.console import Console

    print_heatmap(run, Console(highlight=False), args.title)


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
        )
    except (CheckpointError, TokenizerError) as error:
        raise UserError(error) from error
    print(f"wrote {args.destination}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yoco-eval",
        description="Reports of lm-eval's results, and checkpoints of YOCO models converted. "
        "The evaluation itself is lm-eval's: lm_eval --model yoco --tasks yoco_needle ...",
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
        help="what lm_eval got as --output_path, a folder in it, or one results_*.json file; "
        "of several runs of a model the newest is drawn",
    )
    heatmap.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write to this .png, .svg or .csv file instead of the terminal",
    )
    heatmap.add_argument("--task", metavar="NAME", help="which task, where a run has several")
    heatmap.add_argument("--title", metavar="TEXT", help="a title in place of the model's name")
    heatmap.set_defaults(run=_heatmap)

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
        help="a folder with params.json and checkpoint.pth, a fairseq training checkpoint, "
        "or a folder written by this command",
    )
    convert.add_argument("destination", metavar="DST", help="the folder to write")
    convert.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a folder, tokenizer.json, SentencePiece *.model, *.tiktoken file or cl100k_base "
        "(default: the checkpoint's own)",
    )
    convert.add_argument(
        "--max-length",
        type=_length,
        metavar="N",
        help="the longest context the checkpoint is meant for, in tokens: 65536, 64k, 1m",
    )
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="store the weights so (default: as they are)",
    )
    convert.set_defaults(run=_convert)
    return parser


def _command(commands, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
