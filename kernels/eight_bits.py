"""Keys, or values, of a cache in eight bits each: float8 (e4m3) numbers, a scale for each token and
head.

Of a token's head x [D], and a its greatest absolute value:

    scale = the least power of two, 2^-60 at least, such that a <= 448 * scale
    number = x / scale, rounded to the nearest number of e4m3, to the even one of two

and number * scale is read. 448 is the largest number of e4m3, so that every number has the four
significant bits of that format unless it is less than a / 28672. A power of two costs none of them,
and number * scale is exact in bfloat16, which scales are, too. A scale of each token makes what is
read a matter of the token alone: not of those that are fed, or lie, beside it, and nothing is ever
rounded again. A token that is not finite has a scale, and numbers, of NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUMBER, SCALE = torch.float8_e4m3fn, torch.bfloat16
LEAST = -60  # exponent of the least scale
_NOISE = 1 << 12  # tokens that are made up at a time


@dataclass(frozen=True, eq=False)
class EightBits:
    """Stands where a tensor [Hkv, N, D] of keys or values does; kernels take the two of a `pair`.

    Attributes:
        numbers: float8_e4m3fn [..., N, D].
        scales: bfloat16 [..., N].
    """

    numbers: Tensor
    scales: Tensor

    @classmethod
    def pair(cls, shape: tuple[int, ...], device: torch.device) -> tuple[EightBits, EightBits]:
        """Keys and values of `shape` [..., N, D], uninitialised, as kernels read and write them:
        each token's two scales side by side, which are one word to load."""
        scales = torch.empty(*shape[:-1], 2, dtype=SCALE, device=device)
        keys, values = (
            cls(torch.empty(shape, dtype=NUMBER, device=device), own) for own in scales.unbind(-1)
        )
        return keys, values

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    @property
    def device(self) -> torch.device:
        return self.numbers.device

    def __getitem__(self, index: Any) -> EightBits:
        """Of heads and tokens; all numbers of each."""
        return EightBits(self.numbers[index], self.scales[index])

    def to(self, dtype: torch.dtype) -> Tensor:
        """[..., N, D], as it is read."""
        wide = torch.promote_types(dtype, torch.float32)
        return self.numbers.to(wide).mul_(self.scales[..., None]).to(dtype)

    def normal_(self) -> None:
        """Writes random numbers to all slots of [Hkv, N, D]."""
        heads, slots, dim = self.shape
        for first in range(0, slots, _NOISE):
            count = min(_NOISE, slots - first)
            noise = quantise(torch.randn(heads, count, dim, device=self.device))
            self.numbers[:, first : first + count] = noise.numbers
            self.scales[:, first : first + count] = noise.scales


Held = Tensor | EightBits  # keys, or values, [Hkv, N, D] in a cache


def numbers_of(held: Held) -> Tensor:
    """[Hkv, N, D]"""
    return held.numbers if isinstance(held, EightBits) else held


def scale_words(keys: Held, values: Held) -> Tensor | None:
    """int32 [Hkv, N]: scales of keys in the lower halves, of values in the upper ones.

    None: numbers are what they are.

    Raises:
        ValueError: they are not the two of an `EightBits.pair`, or the same slots of both.
    """
    if isinstance(keys, Tensor) and isinstance(values, Tensor):
        return None
    if isinstance(keys, EightBits) and isinstance(values, EightBits):
        one, other = keys.scales, values.scales
        strides = *one.stride()[:-1], 2
        begin, end = (x.untyped_storage().data_ptr() + x.storage_offset() * 2 for x in (one, other))
        if end - begin == 2 and one.stride() == other.stride() == strides:
            return one.as_strided((*one.shape, 2), (*strides, 1)).view(torch.int32)[..., 0]
    raise ValueError("keys and values are not a pair whose scales are side by side: EightBits.pair")


def quantise(x: Tensor) -> EightBits:
    """x [..., N, D] in eight bits, rounded from its own dtype, at least float32, at once."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    most = x.abs().amax(-1).clamp(min=2.0**LEAST)
    bad = ~most.isfinite()
    x, most = x.masked_fill(bad[..., None], float("nan")), most.masked_fill(bad, 1)
    part, exponent = torch.frexp(most)  # most = part * 2^exponent, part from 1/2 up to 1
    exponent = (exponent - 9 + (part > 0.875).int()).clamp(min=LEAST)
    scales = torch.ldexp(torch.ones_like(most), exponent)
    scaled = x / scales[..., None]
    # PyTorch would round numbers of float64 to float32 first.
    unit = torch.ldexp(torch.ones_like(x), torch.frexp(scaled).exponent.clamp(min=-5) - 4)
    numbers = ((scaled / unit).round_() * unit).to(NUMBER)
    return EightBits(numbers, scales.masked_fill(bad, float("nan")).to(SCALE))
