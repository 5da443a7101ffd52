"""Devices and dtypes as users name them."""

from __future__ import annotations

import torch

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def find_device(name: str = "auto") -> torch.device:
    """The device of a name such as "cuda:1"; "auto": the first GPU if there is one, else the CPU.

    Raises:
        ValueError: it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto": bfloat16 on a GPU, float32 elsewhere.

    Raises:
        ValueError: there is no such name.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]
