"""How many samples of which lengths a time allows, told from what few short ones took.

Prompts of all tasks at all lengths up to one, a sample of each, are a sweep. A length has as many
samples as there are sweeps that reach it: the first go to the longest length, what is left goes
less far. Losses have a share of the time to themselves, as they cost the square of the length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

MOST = 20  # samples of a length
FEWEST = 2  # likewise; longer lengths are left out
DOCUMENTS = 5  # whose losses are asked for, at most
_LOSSES = 0.25  # of the time, at most

Work = Callable[[int], float]


@dataclass(frozen=True)
class Plan:
    """What is evaluated.

    Attributes:
        samples: by context length in tokens, ascending.
        seconds: that a sample of each length takes, beyond those of the lengths before; of all
            lengths, also those that are left out. Empty where nothing was measured.
        documents: whose losses are asked for.
        loss_lengths: up to the longest at which losses are asked for.
        loss_seconds: that a document takes.
    """

    samples: dict[int, int]
    seconds: dict[int, float]
    documents: int
    loss_lengths: list[int]
    loss_seconds: float

    @property
    def total(self) -> float:
        """Seconds that all of it takes."""
        sweeps = sum(self.samples[length] * self.seconds[length] for length in self.samples)
        return sweeps + self.documents * self.loss_seconds


def transformer_work(hidden_size: int) -> Work:
    """What feeding so many tokens costs a transformer, in linear maps of a token.

    Of a layer with d channels these are 12 d^2 multiplications, beside which each token is
    multiplied 2 d times with each of those before it.
    """
    return lambda length: length + length**2 / (12 * hidden_size)


def fitted(measured: Mapping[int, float], slow: Work, fast: Work) -> Work:
    """Seconds at any length, as multiples of two functions of it, of which `fast` grows faster.

    Both are 0 or more, and such that the squared shares by which they miss what was measured are
    the least. Of a single length, all is `fast`.
    """
    # Each measurement as 1 = a x + b y.
    rows = [(slow(n) / seconds, fast(n) / seconds) for n, seconds in measured.items()]
    xx, xy, yy = (
        sum(x * x for x, _ in rows),
        sum(x * y for x, y in rows),
        sum(y * y for _, y in rows),
    )
    xs, ys = sum(x for x, _ in rows), sum(y for _, y in rows)
    determinant = xx * yy - xy * xy
    a, b = 0.0, ys / yy
    if determinant > 1e-12 * xx * yy:
        a, b = (xs * yy - ys * xy) / determinant, (ys * xx - xs * xy) / determinant
        if a < 0:
            a, b = 0.0, ys / yy
        elif b < 0:
            a, b = xs / xx, 0.0
    return lambda length: a * slow(length) + b * fast(length)


def choose(sweeps: Mapping[int, float], losses: Mapping[int, float], seconds: float) -> Plan:
    """What fits.

    Args:
        sweeps: what one sample of each length takes, in seconds.
        losses: likewise of a document's losses up to each length; empty if there are none.
        seconds: that all may take.

    Raises:
        ValueError: not even the shortest length fits; the error tells how many seconds it takes.
    """
    lengths = sorted(sweeps)
    of_a_sweep = dict(zip(lengths, accumulate(sweeps[n] for n in lengths), strict=True))
    share = _LOSSES * seconds
    ends = [length for length in sorted(losses) if FEWEST * losses[length] <= share]
    cost = losses[ends[-1]] if ends else 0.0
    documents = min(DOCUMENTS, int(share / cost)) if ends else 0
    left = seconds - documents * cost
    fitting = [n for n in lengths if FEWEST * of_a_sweep[n] <= left]
    if not fitting:
        raise ValueError(f"{FEWEST * sweeps[lengths[0]]:.0f} s")
    return Plan(_sweeps(fitting, of_a_sweep, left), dict(sweeps), documents, ends, cost)


def _sweeps(
    lengths: Sequence[int], of_a_sweep: Mapping[int, float], seconds: float
) -> dict[int, int]:
    """The samples of each length."""
    samples, given = {}, 0
    for length in reversed(lengths):
        more = min(MOST - given, int(seconds / of_a_sweep[length]))
        given, seconds = given + more, seconds - more * of_a_sweep[length]
        samples[length] = given
    return dict(sorted(samples.items()))
