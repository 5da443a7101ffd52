"""Arguments of kernels, in another dtype."""

from typing import Any

import torch


def in_float64(args: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, tensors in float64, pairs of them, too."""

    def wide(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(wide, x))
        return x.double() if isinstance(x, torch.Tensor) else x

    return {name: wide(x) for name, x in args.items()}
