"""The HTML page as its readers use it: in a browser, without a network, by mouse and keyboard."""

import os
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from made_results import (
    DEPTHS,
    LENGTHS,
    log_samples,
    needle_results,
    results,
    trained_to,
    write,
    write_family,
    write_training_run,
)

from yoco_eval.reports.comparison import compare
from yoco_eval.reports.comparison_files import save_comparison
from yoco_eval.reports.runs import load_checkpoints

pytestmark = pytest.mark.slow  # a browser is started

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = (
    "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 2'>"
    "{{ 7 * 7 }}&amp;\x1b[31m\n]]>--><svg onload='window.harmed = 3'>\"'`$\\frac{1}{2}$"
)


@pytest.fixture(scope="module")
def browser():
    """A Chromium; where there is none, the tests are skipped, but not where all must pass."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and not os.environ.get("CI"):
        pytest.skip("needs one of " + ", ".join(BROWSERS))
    assert found, "CI needs a browser, or the page is not tested"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens the page of a comparison from disk, offline; in the end nothing may have gone wrong."""
    contexts, problems = [], []

    def opened(page, width=1280, dark=False):
        """page: the file of one, or a comparison to make it of."""
        path = page if isinstance(page, Path) else tmp_path / "page.html"
        if path is not page:
            save_comparison(page, path)
        paths.append(path)
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            offline=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    asked, paths = [], []
    yield opened
    for context in contexts:
        context.close()
    assert not problems
    opened_urls = {path.as_uri() for path in paths}
    assert {url for url in asked if not url.startswith("blob:")} == opened_urls


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The page of a family whose samples were logged."""
    family = write_family(tmp_path_factory.mktemp("family"))
    for folder in family:
        log_samples(next(folder.rglob("results_*.json")))
        scores = {"arc_easy": {"acc,none": len(folder.name) / 20, "acc_stderr,none": 0.001}}
        write(folder, results(scores, folder.name), "results_2.json")
    path = family[0].parent / "page.html"
    save_comparison(compare(load_checkpoints(family), published=True), path)
    return path


def cell(page, checkpoint, length, depth):
    return page.get_by_role(
        "button", name=re.compile(rf"^{checkpoint}, {length} tokens, depth {depth} %")
    )


def rows(page, table):
    return [
        row.all_inner_texts() for row in (r.locator("th, td") for r in table.locator("tr").all())
    ]


def test_summary_comes_first_then_heatmaps(show, logged):
    page = show(logged)
    headings = page.locator("main h2").all_inner_texts()
    assert headings[:3] == ["Effective context length", "Differences", "Needles"]
    effective = rows(page, page.locator("#summary table"))
    assert effective[0] == ["task", "demo-4k", "demo-64k", "demo-256k", "demo-1m"]
    assert effective[1] == ["yoco_needle", "4K", "64K", "256K", "1M"]
    found = page.locator("#differences li").all_inner_texts()
    assert found[0] == page.locator("li.alarm").first.inner_text()
    assert found[0].startswith("REGRESSION: demo-1m is worse than the earlier demo-64k in arc_easy")
    assert any(item.startswith("yoco_needle: demo-64k is better than demo-4k") for item in found)
    assert page.locator(".heatmaps svg").count() == 4
    assert page.locator(".cell").count() == 4 * len(LENGTHS) * len(DEPTHS)
    assert page.locator("#needles figure").count() == 5  # and the curves
    assert "1.0" in page.locator(".heatmaps svg").first.locator("text").all_text_contents()


def test_a_click_on_a_failed_cell_shows_its_samples(show, logged):
    page = show(logged)
    cell(page, "demo-64k", "128K", "20").click()
    dialog = page.get_by_role("dialog")
    assert dialog.locator("h2").inner_text() == "demo-64k, 128K tokens, depth 20 %: 0 of 5 right"
    assert dialog.locator("article").count() == 5
    first = dialog.locator("article").first
    terms, facts = (first.locator(tag).all_inner_texts() for tag in ("dt", "dd"))
    told = dict(zip(terms, facts, strict=True))
    assert told["Sample"] == "0, a prompt of 131,056 tokens"
    number = told["Expected"]
    assert first.locator("mark").inner_text() == f"The special number of Oslo is {number}."
    assert told["Needle"].startswith("… Hay.") and told["Needle"].endswith("Straw. …")
    assert told["Asked"] == "What is the number of Oslo?"
    assert terms[4:] == ["demo-64k", "demo-4k", "demo-256k", "demo-1m"]  # the chosen one first
    assert told["demo-64k"].strip() == "7, I guess."
    assert told["demo-1m"].strip() == f"{number}."
    assert first.locator("dd.wrong").count() == 2 and first.locator("dd.right").count() == 2
    dialog.get_by_role("button", name="Close").click()
    assert not dialog.is_visible()


def test_samples_that_were_not_logged_are_asked_for(show, family):
    page = show(compare(load_checkpoints(family[:1])))
    cell(page, "demo-4k", "4K", "0").click()
    assert "lm_eval --log_samples" in page.get_by_role("dialog").inner_text()


def test_the_keyboard_reaches_all(show, logged):
    page = show(logged)
    focused = page.locator(":focus")
    for _ in range(60):
        page.keyboard.press("Tab")
        if (focused.get_attribute("class") or "") == "cell":
            break
    assert focused.get_attribute("aria-label").startswith("demo-4k, 4K tokens, depth 0 %")
    for key in ("ArrowRight", "ArrowDown", "ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(key)
    assert focused.get_attribute("aria-label").startswith("demo-4k, 8K tokens, depth 10 %")
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog").locator("h2").inner_text().startswith("demo-4k, 8K")
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()
    assert focused.get_attribute("aria-label").startswith("demo-4k, 8K")
    page.keyboard.press("Tab")
    assert focused.inner_text() == "Save as SVG"


def test_the_keyboard_reaches_all_cells_of_a_grid_with_gaps(show, tmp_path):
    write(tmp_path / "a", needle_results(lambda *_: 1.0, lengths=[4096, 2**20], depths=[0, 1]))
    write(tmp_path / "b", needle_results(lambda *_: 1.0, lengths=LENGTHS))
    page = show(compare(load_checkpoints([tmp_path / "a", tmp_path / "b"])))
    focused = page.locator(":focus")
    cell(page, "a", "4K", "0").focus()
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
        seen.append(focused.get_attribute("aria-label").partition(":")[0])
    assert [place.removeprefix("a, ") for place in seen] == [
        "1M tokens, depth 0 %", "1M tokens, depth 0 %", "1M tokens, depth 100 %",
        "4K tokens, depth 100 %", "4K tokens, depth 0 %",
    ]  # fmt: skip


def test_tables_are_sorted(show, logged):
    page = show(logged)
    table = page.locator("#needles table")
    names = [row[0] for row in rows(page, table)]
    assert names[1:] == ["4K", "8K", "16K", "32K", "64K", "128K", "256K", "512K", "1M", "effective"]
    table.get_by_role("button", name="context").click()
    assert [row[0] for row in rows(page, table)] == names
    table.get_by_role("button", name="context").click()
    assert [row[0] for row in rows(page, table)] == [names[0], *names[-2:0:-1], "effective"]
    assert table.locator("th[aria-sort]").all_inner_texts() == ["context"]
    table.get_by_role("button", name="demo-64k").click()
    scores = [float(row[2].split()[0]) for row in rows(page, table)[1:-1]]
    assert scores == sorted(scores) and scores[0] < scores[-1]
    assert scores[0] == 0.11  # as numbers
    # Published rows stay apart from the measured ones.
    benchmarks = page.locator("#benchmarks table")
    before = rows(page, benchmarks)
    benchmarks.get_by_role("button", name="arc_easy").click()
    benchmarks.get_by_role("button", name="arc_easy").click()
    after = rows(page, benchmarks)
    assert after[1][0] == "demo-256k" and after[5:] == before[5:]
    assert after[5] == ["published, not measured here"]


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark(show, logged, dark):
    page = show(logged, dark=dark)

    def colors():
        """Of the text, of the figures' text, and of the paper."""
        return page.evaluate(
            """() => {
                const style = (one) => getComputedStyle(one);
                const label = document.querySelector(".heatmaps svg text");
                return [style(document.body).color, style(label).fill,
                        style(document.body).backgroundColor];
            }"""
        )

    light, night = ("rgb(26, 26, 26)", "rgb(255, 255, 255)"), (
        "rgb(232, 232, 232)", "rgb(22, 24, 27)",
    )  # fmt: skip
    for ink, paper in (night, light) if dark else (light, night):
        assert colors() == [ink, ink, paper]
        page.locator("#theme").click()


def test_a_narrow_screen(show, logged):
    page = show(logged, width=340)
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
    lefts = [svg.bounding_box()["x"] for svg in page.locator(".heatmaps svg").all()]
    assert len(set(lefts)) == 1  # one below the other
    cell(page, "demo-64k", "128K", "20").click()
    box = page.get_by_role("dialog").bounding_box()
    assert 0 <= box["x"] and box["x"] + box["width"] <= 340


def test_figures_are_saved(show, logged, tmp_path):
    page = show(logged, dark=True)
    figure = page.locator("figure").first
    for kind in ("SVG", "PNG"):
        with page.expect_download() as download:
            figure.get_by_role("button", name=f"Save as {kind}").click()
        name = download.value.suggested_filename
        assert name == f"demo-4k-yoco_needle.{kind.lower()}"
        download.value.save_as(tmp_path / name)
    text = (tmp_path / "demo-4k-yoco_needle.svg").read_text()
    root = ET.fromstring(text)
    assert "var(" not in text and "#000000" in text and root.get("width").endswith("pt")
    assert not [e for e in root.iter() if e.get("class") == "cell"]
    from matplotlib.image import imread

    image = imread(tmp_path / "demo-4k-yoco_needle.png")
    assert image.shape[1] == pytest.approx(3.4 * 300, abs=2)
    assert image[0, 0].tolist() == [1, 1, 1, 1] and image.min() < 0.1


def test_hostile_texts_are_shown_not_obeyed(show, tmp_path):
    folders = []
    for name in "ab":
        data = needle_results(trained_to(4096), lengths=LENGTHS[:2], depths=[0, 0.5], samples=2)
        data["results"]["harm" + HOSTILE] = {"acc,none": 0.5, f"{HOSTILE},none": 0.1}
        data["config"]["model_dtype"] = name + HOSTILE
        file = write(tmp_path / name, data)
        texts = ("question", "needle", "excerpt", "number", "generated")
        log_samples(file, **dict.fromkeys(texts, HOSTILE))
        folders.append(file.parent)
    comparison = compare(load_checkpoints(folders, ["x" + HOSTILE, "y" + HOSTILE]))
    page = show(comparison)
    shown = HOSTILE.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert page.evaluate("window.harmed") is None
    assert " ".join(f"x{shown} / y{shown}".split()) == page.title()
    page.locator(".cell").first.click()
    article = page.get_by_role("dialog").locator("article").first
    assert article.locator("dd").nth(2).text_content() == HOSTILE
    assert article.locator("mark").text_content() == HOSTILE
    assert page.evaluate("window.harmed") is None
    assert page.locator("main script, main img, dialog img, dialog script").count() == 0


def test_lengths_are_sorted_as_numbers(show, tmp_path):
    lengths = [4096, 2**20, 3 * 2**19, 2**21, 100_000]
    write(tmp_path / "a", needle_results(lambda *_: 1.0, lengths=lengths))
    page = show(compare(load_checkpoints([tmp_path / "a"])))
    table = page.locator("#needles table")
    table.get_by_role("button", name="context").click()
    assert [row[0] for row in rows(page, table)[1:-1]] == ["4K", "100000", "1M", "1.5M", "2M"]


def test_figures_with_gaps_and_odd_task_names_are_saved(show, tmp_path):
    odd = "task\x1b[31m\x01<&"
    write(tmp_path / "a", needle_results(lambda *_: 1.0, lengths=LENGTHS[:1], task=odd))
    write(tmp_path / "b", needle_results(lambda *_: 1.0, lengths=LENGTHS[:2], task=odd))
    page = show(compare(load_checkpoints([tmp_path / "a", tmp_path / "b"])))
    for kind in ("SVG", "PNG"):
        with page.expect_download() as download:
            page.locator("figure").first.get_by_role("button", name=f"Save as {kind}").click()
        download.value.save_as(tmp_path / f"saved.{kind}")
    text = (tmp_path / "saved.SVG").read_text()
    ET.fromstring(text)
    assert "var(" not in text and "pattern" in text  # the hatching of cells without results
    assert (tmp_path / "saved.PNG").read_bytes().startswith(b"\x89PNG")


def test_four_checkpoints_take_few_megabytes(logged):
    assert logged.stat().st_size < 6e6


@pytest.fixture(scope="module")
def largest(tmp_path_factory):
    """The page of 12 checkpoints and 40 tasks, samples included."""
    folder = tmp_path_factory.mktemp("run")
    folders = write_training_run(folder, needles=2, curves=13, benchmarks=25, log=True)
    comparison = compare(load_checkpoints(folders), order="step")
    assert len(comparison.names) == 12 and len(comparison.checkpoints[0].datasets) == 40
    save_comparison(comparison, folder / "page.html")
    return folder / "page.html"


def test_twelve_checkpoints_and_forty_tasks(show, largest):
    """How soon it is ready is measured by benchmarks/page.py."""
    assert largest.stat().st_size < 8e6
    page = show(largest)
    assert page.locator("h1").inner_text() == "12 checkpoints: step-1000 to step-12000"
    assert page.evaluate("document.querySelectorAll('*').length") < 30_000
    assert page.locator(".cell").count() == 0  # they are laid when a task's heatmaps are opened
    closed = page.locator("details:not([open])").count()
    assert closed == page.locator("details").count() > 40
    assert page.locator("#summary figure").count() == 1
    matrix = page.locator("#differences table").first
    assert len(rows(page, matrix)) == 12 and matrix.locator("td.better").count() > 30
    assert page.locator("#differences > ul li").count() < 60


def test_what_is_folded_is_reached_by_keyboard_on_a_narrow_screen(show, largest):
    page = show(largest, width=390, dark=True)
    focused = page.locator(":focus")
    summary = page.locator("#needles summary", has_text="yoco_needle").first
    summary.focus()
    page.keyboard.press("Enter")
    page.locator("#needles .cell").first.wait_for()
    assert page.locator(".cell").count() == 12 * len(LENGTHS) * len(DEPTHS)
    page.keyboard.press("Tab")
    assert focused.get_attribute("aria-label").startswith("step-1000, 4K tokens, depth 0 %")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    assert dialog.locator("h2").inner_text().startswith("step-1000, 8K tokens")
    assert dialog.locator("article").count() == 5
    page.keyboard.press("Escape")
    for one in page.locator("#differences summary").all():
        one.press("Enter")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # Names of rows stay where their figures are scrolled.
    table = page.locator("#differences table").first
    name = table.locator("tbody th").first
    before = name.bounding_box()["x"]
    table.locator("xpath=..").evaluate("scroll => { scroll.scrollLeft = 300; }")
    assert name.bounding_box()["x"] == before
