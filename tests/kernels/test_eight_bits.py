"""Keys and values in eight bits: rounding by definition, and kernels over such a cache.

What is read is number times scale: attention over it is attention over tensors of these.
"""

import pytest
import torch

from yoco_eval.kernels import attention
from yoco_eval.kernels.attention import batch_attention_reference, cache_attention_reference
from yoco_eval.kernels.cache_writes import store_keys_values_reference
from yoco_eval.kernels.eight_bits import EightBits, quantise, scale_words
from yoco_eval.kernels.rotary import rotary_angles, rotate
from yoco_eval.kernels.sequences import Readings, Span, Spans
from yoco_eval.kernels.sparse_attention import listed_attention_reference, summarise_reference
from yoco_eval.kernels.striped_attention import cache_attention_part_reference
from yoco_eval.kernels.stripes import Stripes

# Query heads, key-value heads, and numbers in each.
SHAPES = [(4, 2, 16), (3, 1, 24), (6, 2, 72)]  # of 72, values are read as words by few rows
if torch.cuda.is_available():
    SHAPES += [(24, 8, 128), (8, 8, 64), (16, 2, 256), (2, 1, 512)]
FINITE = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
FINITE = FINITE[FINITE.isfinite()].unique()


@pytest.fixture(autouse=True)
def takes_eight_bits():
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no numbers of eight bits")


def nearest(x):
    """Of e4m3's numbers, the nearest to each; of two, the one whose last bit is 0."""
    distance = (FINITE - x[..., None]).abs()
    least = distance.amin(-1, keepdim=True)
    code = FINITE.to(torch.float8_e4m3fn).view(torch.uint8) % 2
    return FINITE[(distance * 2 + (distance == least) * (code - 2.0) * least).argmin(-1)]


def by_definition(x):
    """What is read of x [..., D], float64."""
    most = x.abs().amax(-1, keepdim=True)
    scales = torch.full_like(most, 2.0**-60)
    for exponent in range(-59, 60):
        scales = torch.where(448 * scales < most, torch.full_like(most, 2.0**exponent), scales)
    return nearest(x / scales) * scales


def numbers(*shape, dtype=torch.float64, device="cpu"):
    """Of all sizes, some halfway between two of e4m3's."""
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64) * torch.randn(shape[:-1])[..., None].exp() ** 3
    x *= torch.randn(*shape).exp() ** 2
    halves = torch.tensor([448, 17, 19, 1.0625, 2**-7, 3 * 2.0**-10, 2.0**-10, 2.0**-12])
    x[0, 0, :8] = halves * 0.25
    x[1, 0], x[2, 0] = 0, 1e-6 * x[2, 0]
    x[3, 0], x[3, 0, 0] = x[3, 0].clamp(-400, 400), 449
    return x.to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_quantise(dtype):
    x = numbers(9, 3, 24, dtype=dtype)
    held = quantise(x)
    assert torch.equal(held.to(torch.float64), by_definition(x.double()))
    assert torch.equal(held.to(torch.bfloat16).double(), held.to(torch.float64))
    assert torch.equal(quantise(held.to(torch.float64)).to(torch.float64), held.to(torch.float64))


def test_numbers_of_float64_are_rounded_once():
    """Just above halfway between 16 and 18, which float32 cannot tell from it."""
    x = torch.tensor([[17 + 2.0**-40, 448]], dtype=torch.float64)
    assert quantise(x).to(torch.float64).tolist() == [[18, 448]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    held = quantise(torch.tensor([[1.0, value], [1.0, 2.0]]))
    assert held.to(torch.float32).isfinite().tolist() == [[False, False], [True, True]]


def poisoned(heads, slots, dim, device):
    """Keys and values of which nothing may be read."""
    pair = EightBits.pair((heads, slots, dim), torch.device(device))
    for held in pair:
        held.numbers.view(torch.uint8).fill_(0x7F)
        # As a float32 whose bits kernels take from those of 2^127, it leaves NaN: the interpreter
        # does not know those of the numbers.
        held.scales.view(torch.int16).fill_(0xFF40 - 0x10000)
    return pair


def write(held, slots, x):
    """x [Hkv, slots, D], rounded."""
    own = quantise(x)
    held.scales[:, slots] = own.scales
    held.numbers.view(torch.uint8)[:, slots] = own.numbers.view(torch.uint8)


def paired(keys, values):
    pair = EightBits.pair(keys.shape, keys.device)
    for held, x in zip(pair, (keys, values), strict=True):
        write(held, range(x.shape[1]), x)
    return pair


def test_noise():
    for held in poisoned(2, 5000, 8, "cpu"):
        held.normal_()
        x = held.to(torch.float64)
        assert x.isfinite().all() and 0.9 < x.std() < 1.1


def test_scales_are_read_as_words():
    pair = poisoned(2, 9, 8, "cpu")
    for held in pair:
        held.normal_()
    for part in (pair, [held[:, 2:7] for held in pair]):
        words = scale_words(*part)
        assert words.shape == part[0].shape[:2]
        for held, bits in zip(part, (words << 16, words & -0x10000), strict=True):
            assert torch.equal(bits.view(torch.float32), held.scales.float())
    assert scale_words(*torch.zeros(2, 1, 4, 8)) is None
    assert scale_words(*(held[:, 3:3] for held in pair)).shape == (2, 0)
    x = torch.randn(2, 9, 8)
    for others in ((quantise(x), quantise(x)), (pair[1], pair[0]), (pair[0], x), (x, pair[1])):
        with pytest.raises(ValueError, match=r"side by side: EightBits\.pair"):
            scale_words(*others)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dim", [16, 24])
def test_triton_store(dim, on_device, dtype, device):
    pytest.importorskip("triton")
    from yoco_eval.kernels.cache_writes_triton import store_keys_values

    k, v = (numbers(21, 3, dim, dtype=dtype, device=device) for _ in range(2))
    angles = rotary_angles(torch.arange(21, device=device), dim, 1e4, dtype)
    slots = 5 + torch.randperm(21, device=device) if on_device else 5
    for turned in (angles, None):
        found, expected = (poisoned(3, 30, dim, device) for _ in range(2))
        store_keys_values(k, v, turned, *found, slots)
        store_keys_values_reference(k, v, turned, *expected, slots)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.scales, other.scales, equal_nan=True, rtol=0, atol=0)
            here, there = (x.to(torch.float32).nan_to_num(-7) for x in (one, other))
            # Where a sum is rounded otherwise, so may the number be that is next to halfway.
            assert (here == there).float().mean() > 0.999
            torch.testing.assert_close(here, there, rtol=2**-3, atol=1e-8)


def test_store_is_as_defined():
    """Keys are rotated, and rounded once, from bfloat16, too."""
    k, v = (numbers(9, 2, 16, dtype=torch.bfloat16) for _ in range(2))
    angles = rotary_angles(torch.arange(9), 16, 1e4, torch.bfloat16)
    held = poisoned(2, 20, 16, "cpu")
    store_keys_values_reference(k, v, angles, *held, 3)
    turned = rotate(k.float(), tuple(x.float() for x in angles))
    for one, x in zip(held, (turned, v), strict=True):
        read = one[:, 3:12].to(torch.float64).transpose(0, 1)
        assert torch.equal(read, by_definition(x.double()))
        assert one.to(torch.float64).isfinite().all(-1).sum() == 2 * 9


def filled(read, heads, slots, dim, dtype, device):
    """Keys and values in eight bits of some slots, and in float64 what is read of them.

    They are the same on all devices. Keys are of all sizes up to twice the usual: of longer ones,
    rounding rotated queries to bfloat16 alone may take up what an error is allowed to be.
    """
    held = poisoned(heads, slots, dim, device)
    for seed, every in enumerate(held):
        torch.manual_seed(seed)
        x = torch.randn(heads, len(read), dim)
        x *= torch.randn(heads, len(read), 1).exp().clamp(max=2)
        write(every, read, x.to(device))
    return held, [every.to(torch.float64) for every in held]


# Texts that share a prefix behind which each goes on, and one that is alone.
SPANS = (
    Span(0, 40, 3, 150, False, 0),
    Span(0, 30, 151, 190, True, 147),
    Span(30, 40, 200, 211, True, 147),
    Span(40, 47, 220, 301, True, 0),
)
FEW = (
    Span(0, 5, 3, 150, False, 0),
    Span(0, 3, 151, 190, True, 147),
    Span(3, 5, 200, 211, True, 147),
)
READ = [*range(3, 150), *range(151, 190), *range(200, 211), *range(220, 301)]
ROWS = (
    Span(0, 2, 3, 150, False, 0),
    Span(0, 1, 151, 190, False, 147),
    Span(1, 2, 200, 300, False, 147),
)


def queries(count, heads, dim, dtype, device):
    torch.manual_seed(2)
    q = torch.randn(count, heads, dim).to(dtype).to(device)
    return q, rotary_angles(torch.arange(count, device=device), dim, 1e4, dtype)


def double(angles):
    return tuple(x.double() for x in angles)


@pytest.mark.parametrize(("query_heads", "heads", "dim"), SHAPES)
def test_references(query_heads, heads, dim, monkeypatch):
    """In float64: one over what another reads."""
    monkeypatch.setattr(attention, "KEYS", 50)
    held, wide = filled(READ, heads, 320, dim, torch.float64, "cpu")
    q, angles = queries(47, query_heads, dim, torch.float64, "cpu")
    for spans, window in (
        (Spans(SPANS), None),
        (Spans((Span(0, 47, 220, 301, True, 0),)), None),
        (Spans((Span(0, 47, 220, 301, True, 0),)), 20),
    ):
        found, expected = (
            cache_attention_reference(q, *x, spans, angles, window=window) for x in (held, wide)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for rows in (Readings([1, 0], ROWS), Readings([0], (Span(0, 1, 3, 150, False, 0),))):
        at = torch.tensor([150, 170])[: len(rows.order)]
        found, expected = (
            batch_attention_reference(q[: len(at)], *x, at, rows) for x in (held, wide)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("query_heads", "heads", "dim"), SHAPES)
def test_triton_cache_attention(query_heads, heads, dim, dtype, device, close):
    pytest.importorskip("triton")
    from yoco_eval.kernels.attention_triton import cache_attention

    held, wide = filled(READ, heads, 320, dim, dtype, device)
    q, angles = queries(47, query_heads, dim, dtype, device)
    for parts, window in (
        (SPANS, None),
        ((Span(0, 47, 220, 301, True, 0),), 20),
        (FEW, None),
        ((Span(0, 5, 220, 301, True, 0),), 20),
    ):
        spans, count = Spans(parts), parts[-1].end_query
        some, turned = q[:count], tuple(x[:count] for x in angles)
        expected = cache_attention_reference(
            some.double(), *wide, spans, double(turned), window=window
        )
        close(cache_attention(some, *held, spans, turned, window=window), expected)


def test_triton_long_text(dtype, device, close):
    """So many queries of one text that library kernels would take them."""
    pytest.importorskip("triton")
    from yoco_eval.kernels import attention_triton

    count = 1500 if device == "cuda" else 130
    held, wide = filled(range(4, 4 + count), 1, count + 9, 32, dtype, device)
    q, angles = queries(count, 2, 32, dtype, device)
    spans = Spans((Span(0, count, 4, 4 + count, True, 0),))
    expected = cache_attention_reference(q.double(), *wide, spans, double(angles))
    close(attention_triton.cache_attention(q, *held, spans, angles), expected)


@pytest.mark.parametrize(("query_heads", "heads", "dim"), SHAPES)
def test_triton_batch_attention(query_heads, heads, dim, dtype, device, close):
    pytest.importorskip("triton")
    from yoco_eval.kernels.attention_triton import batch_attention

    positions = torch.tensor([246, 184], device=device)
    read = [*range(3, 150), *range(151, 189), *range(200, 300)]
    held, wide = filled(read, heads, 320, dim, dtype, device)
    q, angles = queries(2, query_heads, dim, dtype, device)
    rows = Readings([1, 0], ROWS)
    expected = batch_attention_reference(q.double(), *wide, positions, rows, double(angles))
    close(batch_attention(q, *held, positions, rows, angles), expected)


def test_triton_values_of_all_sizes(dtype, device, close):
    """Of tokens that are attended to most, as texts' first ones often are, values may be least."""
    pytest.importorskip("triton")
    from yoco_eval.kernels.attention_triton import batch_attention

    torch.manual_seed(0)
    keys, small = torch.randn(2, 1, 300, 16, device=device)
    q = torch.randn(1, 2, 16, dtype=dtype, device=device)
    sinks = small.clone()
    keys[:, :2], sinks[:, 0], sinks[:, 1], sinks[:, 2:200] = 2 * q[:, 0], 0, 1e-14, 100
    rows, positions = Readings([0], [Span(0, 1, 0, 300, False, 0)]), torch.tensor([299]).to(device)
    for values in (sinks, 1e-4 * small):
        held = paired(keys, values)
        wide = [x.to(torch.float64) for x in held]
        expected = batch_attention_reference(q.double(), *wide, positions, rows)
        close(batch_attention(q, *held, positions, rows), expected)


def test_triton_queries_of_all_sizes(dtype, device, close):
    """Of one head, and from head to head, as of the keys that they meet."""
    pytest.importorskip("triton")
    from yoco_eval.kernels.attention_triton import batch_attention

    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 300, 16, device=device)
    q = torch.randn(1, 2, 16, device=device)
    sizes = torch.tensor([2.0**-13, 1]).to(device)[:, None]
    q, keys = q * sizes, 4 * keys / sizes[:, None]
    q[..., 3] *= 2**14
    keys[..., 3] /= 2**14
    q = q.to(dtype)
    rows, positions = Readings([0], [Span(0, 1, 0, 300, False, 0)]), torch.tensor([299]).to(device)
    held = paired(keys, values)
    wide = [x.to(torch.float64) for x in held]
    expected = batch_attention_reference(q.double(), *wide, positions, rows)
    close(batch_attention(q, *held, positions, rows), expected)


def test_triton_stripes(dtype, device, close):
    """What a process adds that holds but some of the slots."""
    pytest.importorskip("triton")
    from yoco_eval.kernels.attention_triton import cache_attention_part

    stripes = Stripes(1, 3, 4)
    slots = [slot for slot in READ if slot // 4 % 3 == 1]
    own = [stripes.held(slot) for slot in slots]
    held, wide = filled(own, 2, 120, 72, dtype, device)
    every, angles = queries(47, 6, 72, dtype, device)
    for parts in (SPANS, FEW):
        spans, count = Spans(parts), parts[-1].end_query
        q, turned = every[:count], tuple(x[:count] for x in angles)
        expected = cache_attention_part_reference(q.double(), *wide, spans, stripes, double(turned))
        close(cache_attention_part(q, *held, spans, stripes, turned), expected)


@pytest.mark.parametrize("dim", [24, 72])
def test_triton_what_is_not_finite(dim, dtype, device):
    """Whoever sees such a token gets NaN; a key does nothing to others."""
    pytest.importorskip("triton")
    from yoco_eval.kernels.attention_triton import cache_attention
    from yoco_eval.kernels.cache_writes_triton import store_keys_values

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 2, dim, device=device).to(dtype)
    bad = torch.randn(9, 2, dim, device=device).to(dtype)
    bad[4, :, 3] = float("inf")
    spans = Spans((Span(0, 9, 0, 9, True, 0),))

    def found(k, v):
        held = poisoned(2, 9, dim, device)
        store_keys_values(k, v, None, *held, 0)
        return cache_attention(q, *held, spans)

    of_key = found(bad, v)
    assert of_key[:4].isfinite().all() and of_key[4:].isnan().all()
    if device == "cuda":  # the interpreter knows no NaN of eight bits
        assert found(k, bad)[4:].isnan().all()


@pytest.mark.parametrize(("query_heads", "heads", "dim"), SHAPES)
def test_triton_blocks(query_heads, heads, dim, dtype, device, close):
    """Summaries are of what is read; queries read blocks of it."""
    pytest.importorskip("triton")
    from yoco_eval.kernels.sparse_attention_triton import listed_attention, summarise

    read = [*range(128), *range(192, 300)]
    held, wide = filled(read, heads, 384, dim, dtype, device)
    found = torch.zeros(heads, 6, 2, dim, dtype=dtype, device=device)
    slots = torch.tensor([5, 63, 127, 255, 256], device=device)
    summarise(held[0], found, slots)
    for keys in (held[0], wide[0]):
        expected = torch.zeros_like(found, dtype=torch.float64)
        summarise_reference(keys, expected, slots)
        assert torch.equal(found.double(), expected)
    q, angles = queries(3, query_heads, dim, dtype, device)
    chosen = torch.tensor([[0, 4, 0], [0, 1, 4], [3, 0, 0]], dtype=torch.int32, device=device)
    chosen = chosen[:, None].expand(-1, heads, -1).contiguous()
    positions = torch.tensor([107, 171, 60], device=device)
    for each in (held, wide):
        expected = listed_attention_reference(q.double(), *each, chosen, positions, double(angles))
        close(listed_attention(q, *held, chosen, positions, angles), expected)
