"""The families of models that there are, and which of them a checkpoint is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from .checkpoint import load_config, open_yoco, resolve_checkpoint
from .errors import CheckpointError
from .gemma3n import open_gemma3n
from .gemma4 import open_gemma4
from .hub import hub_commit
from .interface import Blueprint, Model, default_dtype
from .phi4flash import open_phi4flash

# Each says of a path what model lies there, or None where it is of another family.
_FAMILIES: tuple[Callable[[Path], Blueprint | None], ...] = (
    open_yoco,
    open_gemma3n,
    open_gemma4,
    open_phi4flash,
)


def open_checkpoint(name: str | Path, revision: str | None = None) -> Blueprint:
    """The model of a checkpoint, given by path, or by the name of a bundled one or one on the hub.

    Only its configuration is read, and fetched from the hub, before the model is made.

    Args:
        name, revision: as `resolve_checkpoint` takes them.

    Raises:
        CheckpointError: nothing there, or of no family, or an unsafe or damaged checkpoint; faults
            of the weights when the model is made.
    """
    path = resolve_checkpoint(name, revision)
    for family in _FAMILIES:
        if blueprint := family(path):
            return replace(blueprint, make=partial(_make, blueprint, name, hub_commit(path)))
    load_config(path)  # says what it is
    raise CheckpointError(f"{path}: of no family of models that is known here")


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Model:
    """A model for evaluation; no code of the checkpoint is run.

    Args:
        name, revision: as `open_checkpoint` takes them.
        device: default: the GPU if there is one, else the CPU.
        dtype: default: that of `default_dtype`.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return open_checkpoint(name, revision).make(device, dtype or default_dtype(device))


def _make(
    blueprint: Blueprint,
    name: str | Path,
    commit: str | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Model:
    resolve_checkpoint(name, commit, weights=True)
    return blueprint.make(device, dtype)
