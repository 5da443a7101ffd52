"""Refusals of settings that are out of range: a damaged or made-up file is told in one line."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from yoco_eval.printable import listed, shown


def check_count(name: str, value: Any, largest: int) -> None:
    """Refuses what is no whole number from 1 to `largest`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, not {shown(value)}")
    if value > largest:
        raise ValueError(f"{name} must be at most {largest}, not {shown(value)}")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Refuses what is no number from `least`, above 0, to `most`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not value > 0:  # which NaN is not
        raise ValueError(f"{name} must be a positive number, not {shown(value)}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least:g} to {most:g}, not {shown(value)}")


def check_flag(name: str, value: Any) -> None:
    """Refuses what is neither true nor false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {shown(value)}")


def check_multiple(name: str, value: int, of: int) -> None:
    """Refuses what is no multiple of `of`."""
    if value % of:
        raise ValueError(f"{name} = {value} is no multiple of {of}")


def check_only(settings: Mapping[str, Any], only: Mapping[str, Any]) -> None:
    """Refuses settings of which one value is supported, the one that holds where they are left
    out, if they have another."""
    for name, value in only.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"{name} = {shown(settings[name])} is not supported, only {shown(value)}; evaluate "
                "this model with --model hf"
            )


def check_known(unknown: Collection[str]) -> None:
    """Refuses settings that nothing here reads, if there are any: they could change the model."""
    if unknown:
        raise ValueError(
            f"unknown settings: {listed(sorted(unknown))}; if they change the model, evaluate it "
            "with --model hf, else take them out of the file"
        )
