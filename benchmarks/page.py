"""How large a report's HTML page is, and how soon it is ready in a browser.

    python benchmarks/page.py extension.html
    python benchmarks/page.py --checkpoints 12 --needles 4 --curves 12 --benchmarks 24

A page that is not given is made of a run that nobody trained, whose results are chosen, samples of
one task included; with `--output` it stays. A page is ready when all of its script has run and the
first screen has been painted. It is read from disk, without a network; the figures are medians of
`--repeats` fresh pages in one Chromium, which playwright drives.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.table import Table

from yoco_eval.reports.comparison import compare
from yoco_eval.reports.comparison_files import save_comparison
from yoco_eval.reports.runs import load_checkpoints

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SCREENS = {"wide": 1280, "a phone's": 390}
READY = """() => new Promise((resolve) =>
  requestAnimationFrame(() => setTimeout(() => resolve(performance.now()))))"""
COUNT = "document.querySelectorAll('*').length"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", nargs="?", type=Path, help="an .html file of yoco-eval compare")
    parser.add_argument("--checkpoints", type=int, default=12)
    parser.add_argument("--needles", type=int, default=4, help="tasks with heatmaps (4)")
    parser.add_argument("--curves", type=int, default=12, help="tasks by context length (12)")
    parser.add_argument("--benchmarks", type=int, default=24, help="tasks with one score (24)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where a page that is made stays"
    )
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"error: needs one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        page = args.page or make(args, Path(folder))
        with sync_playwright() as playwright:
            started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            table = Table("screen", "pixels", "ready, s", "elements", box=None)
            for name, width in SCREENS.items():
                found = [ready(started, page, width) for _ in range(args.repeats)]
                seconds = median(one for one, _ in found)
                table.add_row(name, str(width), f"{seconds:.2f}", str(found[0][1]))
            started.close()
        console = Console()
        console.print(f"{page.name}: {page.stat().st_size / 1e6:.2f} MB")
        console.print(table)


def make(args: argparse.Namespace, folder: Path) -> Path:
    """The page of a made run, whose results are those of the tests."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "reports"))
    from made_results import write_training_run

    folders = write_training_run(
        folder, args.needles, args.curves, args.benchmarks, args.checkpoints, log=True
    )
    begin, page = perf_counter(), args.output or folder / "page.html"
    save_comparison(compare(load_checkpoints(folders), order="step"), page)
    print(f"made in {perf_counter() - begin:.1f} s")
    return page


def ready(browser: Browser, page: Path, width: int) -> tuple[float, int]:
    """Seconds from the start of navigation until the page is ready, and its elements."""
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    opened = context.new_page()
    opened.goto(page.resolve().as_uri())
    found = opened.evaluate(READY) / 1000, opened.evaluate(COUNT)
    context.close()
    return found


if __name__ == "__main__":
    main()
