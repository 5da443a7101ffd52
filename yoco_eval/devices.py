"""Devices and dtypes as users name them. PyTorch is imported only once one is looked up."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32", "float64")  # as PyTorch names them
CACHE_DTYPES = ("fp8",)  # of a cache, beside the model's


def find_device(name: str = "auto") -> torch.device:
    """The device of a name such as "cuda:1"; "auto": the first GPU if there is one, else the CPU.

    Raises:
        ValueError: it cannot be used.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cuda", "cpu"):
            raise RuntimeError("models run on cuda and cpu alone")
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name in `DTYPES`; "auto": what models are evaluated in on the device.

    Raises:
        ValueError: there is no such name.
    """
    import torch

    from yoco_eval.model.interface import default_dtype

    if name == "auto":
        return default_dtype(device)
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; choose one of auto, {', '.join(DTYPES)}")
    return getattr(torch, name)


def check_cache_dtype(name: str, device: torch.device, option: str) -> None:
    """Checks that a cache can hold numbers of a dtype of `CACHE_DTYPES` on a device.

    Args:
        option: that asks for it, for messages.

    Raises:
        ValueError: there is no such dtype, or the device has no such numbers.
    """
    import torch

    if name not in CACHE_DTYPES:
        raise ValueError(
            f"{option}: choose {', '.join(CACHE_DTYPES)}, or leave it out, and the cache has the "
            "model's dtype"
        )
    if device.type == "cuda" and torch.version.hip is None:
        least, own = (8, 9), torch.cuda.get_device_capability(device)
        if own < least:
            raise ValueError(
                f"{option} takes a GPU of compute capability 8.9 or above, and "
                f"{torch.cuda.get_device_name(device)} has {own[0]}.{own[1]}: leave it out"
            )


def device_of_rank(name: str | None, local_rank: int) -> str:
    """What the device that was asked for is in one of several processes of a machine.

    Each has the GPU of its number, but where it sees one alone, as Slurm may arrange it.

    Args:
        name: as in `find_device`; None: as "auto". "cuda:0" is lm-eval's way to say so.

    Raises:
        ValueError: there are fewer GPUs than processes, or all were to take the same one.
    """
    import torch

    if name not in (None, "auto", "cuda", "cuda:0"):
        if name.startswith("cuda"):
            raise ValueError(
                f"device={name} is one for several processes; leave it out, and each has its own"
            )
        return name
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return "cpu" if name != "cuda" else name
    if 1 < count <= local_rank:
        raise ValueError(
            f"there are {count} GPUs, and more processes on this machine; start as many"
        )
    index = min(local_rank, count - 1)
    torch.cuda.set_device(index)
    return f"cuda:{index}"
