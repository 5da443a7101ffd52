"""A text in parts, each with a process of its own, against the whole: what kernels hand on."""

import pytest
import torch
from arguments import in_float64
from test_delta_rule import packed as delta_arguments
from test_retention import packed as retention_arguments

from yoco_eval.kernels import delta_rule, retention
from yoco_eval.kernels.attention import sliding_window_attention
from yoco_eval.kernels.relay import Relay
from yoco_eval.kernels.rotary import rotary_angles
from yoco_eval.kernels.sequences import Sequences
from yoco_eval.kernels.short_convolution import short_convolution

ON_GPU = torch.cuda.is_available()
DIMS = (128, 256) if ON_GPU else (16, 16)
UNIT = 64 if ON_GPU else 16  # tokens of a chunk of the kernels


class Rehearsal:
    """A group whose processes run one after the other: first to hear what each one says of its
    part alone, and then with that. The state at the end, of which each keeps its own, is later."""

    def __init__(self, size):
        self.size, self.rank = size, 0
        self.said = [[] for _ in range(size)]
        self.handed = {}
        self.heard = None  # how much of what was said, by the present one

    def run(self, process):
        """What each process returns."""
        results = []
        for hears in (None, 0):
            for rank in range(self.size):
                self.rank, self.heard = rank, hears
                results.append(process())
        results = results[self.size :]
        assert not self.handed  # all of it has arrived
        return results

    def gather(self, x):
        if self.heard is None:
            self.said[self.rank].append(x.clone())
            return x.new_zeros(self.size, *x.shape)
        self.heard += 1
        return torch.stack([own[self.heard - 1] for own in self.said])

    def share(self, x, source):
        return x

    def hand_over(self, sent, received):
        if self.heard is None:
            self.handed |= {(self.rank, to): x.clone() for to, x in sent.items()}
            return
        for source, x in received.items():
            assert x.is_contiguous()
            x.copy_(self.handed.pop((source, self.rank)))


def in_parts(run, lengths, start=0, device="cpu"):
    """The outputs of `run` one behind the other, and the last part's state.

    `run` takes a `Sequences`, and which tokens are its.
    """
    group = Rehearsal(len(lengths))
    relay = Relay(group, lengths)

    def process():
        own = relay.own
        length = own.stop - own.start
        sequences = Sequences((length,), (start + own.start,), torch.device(device), relay=relay)
        return run(sequences, own)

    outputs, states = zip(*group.run(process), strict=True)
    return torch.cat(outputs), states[-1]


def same(output, reference):
    torch.testing.assert_close(output, reference, rtol=0, atol=1e-11)


def check_rule(rule, reference, check, args, lengths, device="cpu"):
    """Retention or the delta rule, of the arguments of the whole text."""
    per_token = {
        name for name, x in args.items()
        if isinstance(x, torch.Tensor) and name not in ("states", "a_log", "dt_bias", "weight")
    }  # fmt: skip

    def run(sequences, own):
        rows = {name: args[name][own] for name in per_token}
        return rule(**args | rows | {"sequences": sequences})

    out, state = in_parts(run, lengths, device=device)
    expected, last = reference(**in_float64(args))
    check(out, expected)
    check(state, last)


LENGTHS = [(70, 3, 1, 90), (1, 1), (33,), (1, 200, 5)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("given", [0, 1])
def test_retention(lengths, given):
    args = retention_arguments([sum(lengths)], states=given)
    check_rule(retention.gated_retention, retention.gated_retention_reference, same, args, lengths)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("given", [0, 1])
def test_delta_rule(lengths, given):
    args = delta_arguments([sum(lengths)], states=given) | {"negative": bool(given)}
    rule, reference = delta_rule.gated_delta_rule, delta_rule.gated_delta_rule_reference
    check_rule(rule, reference, same, args, lengths)


@pytest.mark.parametrize("lengths", [*LENGTHS, (2, 1, 1, 9, 1)], ids=str)
@pytest.mark.parametrize(("window", "start"), [(1, 0), (5, 0), (5, 3), (40, 13), (40, 100)])
def test_windows(lengths, window, start):
    """Longer than parts, than several of them, and than all there is."""
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = (torch.randn(total, heads, 8).double() for heads in (4, 2, 2))
    angles = rotary_angles(torch.arange(start, start + total), 8, 100.0, torch.float64)
    past = torch.randn(1, 2, window - 1, 2, 8).double() if start else None

    def run(sequences, own):
        cut = tuple(x[own] for x in angles)
        return sliding_window_attention(q[own], k[own], v[own], window, sequences, past, cut)

    out, state = in_parts(run, lengths, start)
    whole = Sequences((total,), (start,), torch.device("cpu"))
    expected, last = sliding_window_attention(q, k, v, window, whole, past, angles)
    same(out, expected)
    unknown = max(0, window - 1 - start - total)
    same(state[:, :, unknown:], last[:, :, unknown:])


@pytest.mark.parametrize("lengths", [*LENGTHS, (2, 1, 1, 9, 1)], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_short_convolution(lengths, given):
    torch.manual_seed(0)
    x, weight = torch.randn(sum(lengths), 6).double(), torch.randn(6, 4).double()
    tails = torch.randn(1, 3, 6).double() if given else None
    out, state = in_parts(
        lambda sequences, own: short_convolution(x[own], weight, sequences, tails), lengths
    )
    whole = Sequences((sum(lengths),), (0,), torch.device("cpu"))
    expected, last = short_convolution(x, weight, whole, tails)
    same(out, expected)
    same(state, last)


# From here on: the Triton kernels, on the GPU or in the interpreter.


@pytest.fixture
def few(dtype, device):
    """The interpreter is slow."""
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("one dtype is enough for the interpreter")


@pytest.mark.slow
@pytest.mark.parametrize(("programs", "gate"), [(1, None), (1 << 20, None), (1 << 20, -40.0)])
def test_triton_retention(programs, gate, dtype, device, close, few, monkeypatch):
    """Parts of one segment, or of several; and with gates that let nothing through."""
    pytest.importorskip("triton")
    from yoco_eval.kernels import retention_triton

    monkeypatch.setattr(retention_triton, "programs", lambda device: programs)
    monkeypatch.setattr(retention_triton, "MIN_SEGMENT", UNIT)
    lengths = 3 * UNIT, UNIT, 2 * UNIT, UNIT + 5
    args = retention_arguments([sum(lengths)], 2, DIMS[0], dtype, device, states=1)
    if gate is not None:
        args["gate"].fill_(gate)
    rule, reference = retention_triton.gated_retention, retention.gated_retention_reference
    check_rule(rule, reference, close, args, lengths, device)


@pytest.mark.slow
@pytest.mark.parametrize(("programs", "decay"), [(1, -9.0), (1 << 20, -9.0), (1 << 20, 2.0)])
def test_triton_delta_rule(programs, decay, dtype, device, close, few, monkeypatch):
    """Parts of one segment, or of several; with decays over all, and over less than a segment."""
    pytest.importorskip("triton")
    from yoco_eval.kernels import delta_rule_triton

    monkeypatch.setattr(delta_rule_triton, "programs", lambda device: programs)
    monkeypatch.setattr(delta_rule_triton, "MIN_SEGMENT", UNIT)
    lengths = 2 * UNIT, UNIT, UNIT + 5
    args = delta_arguments([sum(lengths)], 1, 2, *DIMS, dtype, device, states=1)
    args |= {"a_log": torch.zeros_like(args["a_log"])}
    args |= {"dt_bias": torch.full_like(args["dt_bias"], decay)}
    rule, reference = delta_rule_triton.gated_delta_rule, delta_rule.gated_delta_rule_reference
    check_rule(rule, reference, close, args, lengths, device)
