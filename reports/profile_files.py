"""Writes a profile: as JSON, or as a figure.

Matplotlib, which takes long to import, is left alone until a figure is asked for.
"""

from dataclasses import asdict
from pathlib import Path

from .files import FIGURES, check_path, to_json, write_figure, write_text
from .profile import KIND, Profile


def check_output(path: Path) -> None:
    """Raises ResultsError if `save_profile` cannot write to such a path."""
    check_path(path, (".json", *FIGURES))


def save_profile(profile: Profile, path: str | Path) -> None:
    """Writes the profile to `path`, whose suffix says how: .json, .png, .svg or .pdf.

    Raises ResultsError for another suffix or a folder that is not there.
    """
    path = Path(path)
    check_output(path)
    if path.suffix.lower() == ".json":
        write_text(path, to_json({"kind": KIND, **asdict(profile)}, indent=2) + "\n")
        return
    from .profile_figure import profile_figure
    from .style import figure_style

    with figure_style():
        write_figure(path, profile_figure(profile))
