"""The site of README.md, its front page, and docs/: `make docs` builds it strictly, with Sphinx."""

from pathlib import Path

from yoco_eval import __version__

project = "yoco-eval"
release = __version__
html_title = f"{project} {release}"
html_theme = "furo"
html_copy_source = False

# Pages are read where they lie, so that links lead where they lead in the repository. Its folders
# are no pages: of links to them the names are left.
root_doc = "README"
exclude_patterns = [".*"]
pages = ["docs/*", "CONTRIBUTING", "CHANGELOG", "model/checkpoints/*/README"]
include_patterns = [f"{page}.md" for page in [root_doc, *pages]]
extensions = ["myst_parser"]
myst_heading_anchors = 4
nitpicky = True
nitpick_ignore = [("myst", path.name) for path in Path(__file__).parent.parent.iterdir()]


def setup(app):
    app.connect("source-read", list_pages)
    app.connect("build-finished", write_index)


def list_pages(app, name, source):
    """Has the front page list the others, for which Markdown has no word."""
    if name == root_doc:
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", ":glob:", *pages, "```", ""])


def write_index(app, error):
    """Leads from the site's own address to the front page."""
    if not error:
        text = f'<meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        Path(app.outdir, "index.html").write_text(text, encoding="utf-8")
