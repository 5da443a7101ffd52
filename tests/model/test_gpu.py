"""On a GPU, where Triton kernels and CUDA graphs take over: the same results as on the CPU."""

from pathlib import Path

import pytest
import torch
from predicting import decoded_side_by_side

from yoco_eval.model import Sequences, Span, Spans, load

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.05}
DATA = Path(__file__).parents[1] / "data"
FOLDERS = sorted([*DATA.glob("published/*/"), *DATA.glob("fla/*/")])
TOKENS = 60  # of the vocabulary of each


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pair(folder, request):
    """A model on the GPU and what it is compared with: itself in float64 on the CPU."""
    fast = load(folder, device="cuda", dtype=request.param)
    exact = load(folder, device="cpu", dtype=request.param).double()
    return fast, exact


@pytest.fixture
def ids():
    torch.manual_seed(0)
    return torch.randint(TOKENS, (300,))


def assert_near(output, reference, dtype):
    error = (output.double().cpu() - reference).norm() / reference.norm()
    assert error < LIMIT[dtype], f"relative error {error:.2e}"


@torch.inference_mode()
def test_prefill_of_many_tokens(pair):
    """So many that products are fused, in bfloat16 on Hopper."""
    torch.manual_seed(0)
    ids = torch.randint(TOKENS, (5000,))
    out, expected = (model.prefill(ids.to(model.device), model.new_cache(5000)) for model in pair)
    assert_near(out, expected, pair[0].dtype)


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 63, 1000])
def test_chunked_prefill(pair, ids, chunk):
    fast, exact = pair
    cache, logits = fast.new_cache(len(ids)), []
    for start in range(0, len(ids), chunk):
        x = fast.prefill(ids[start : start + chunk].cuda(), cache)
        positions = torch.arange(start, cache.state.length, device="cuda")
        spans = Spans((Span(0, len(x), 0, cache.state.length, causal=True),))
        logits.append(fast.output_projection(fast.predict(x, positions, cache, spans)))
    assert_near(torch.cat(logits), exact(ids[None])[0], fast.dtype)


@torch.inference_mode()
@pytest.mark.parametrize("prompt", [0, 1, 200])
def test_decoding_under_a_graph(pair, ids, prompt):
    fast, exact = pair
    cache = fast.new_cache(len(ids))
    if prompt:
        fast.prefill(ids[:prompt].cuda(), cache)
    decoder = fast.decoder(cache)
    for _ in range(2):  # the second time from the states that the first one has changed
        decoder.start(int(ids[prompt]))
        logits = []
        for token in [*ids[prompt + 1 :], 0]:
            decoder.step()
            logits.append(decoder.logits[0].clone())
            assert decoder.tokens == decoder.logits.argmax()
            decoder.tokens.fill_(token)
        assert_near(torch.stack(logits), exact(ids[None])[0, prompt:], fast.dtype)


@torch.inference_mode()
def test_texts_decode_side_by_side_under_graphs(pair):
    """Two that share a prefix and one from its first token on, as they come, move and go."""
    fast, exact = pair
    texts = torch.randint(TOKENS, (3, 50), generator=torch.Generator().manual_seed(3))
    texts[1, :30] = texts[0, :30]
    full = exact(texts)
    found, expected = [], []
    for text, position, logits in decoded_side_by_side(fast, texts):
        found.append(logits)
        expected.append(full[text, position])
    assert len(found) == 9 + 12 + 8
    assert_near(torch.stack(found), torch.stack(expected), fast.dtype)


@torch.inference_mode()
def test_packed_sequences(pair):
    fast, exact = pair
    torch.manual_seed(1)
    texts = [torch.randint(TOKENS, (n,)) for n in (20, 133)]
    rests = [torch.randint(TOKENS, (n,)) for n in (5, 70, 1)]
    sources, cache = (1, 0, 1), fast.new_cache(300)
    device = cache.keys.device
    texts_packed = Sequences((20, 133), (0, 0), device)
    _, state = fast.feed(torch.cat(texts).cuda(), texts_packed, cache.state, cache)
    sequences = Sequences((5, 70, 1), (133, 20, 133), device, sources)
    x, _ = fast.feed(torch.cat(rests).cuda(), sequences, state, cache, keep=False)
    spans = Spans(
        (
            Span(0, 5, 20, 153, causal=False),
            Span(0, 5, 153, 158, causal=True),
            Span(5, 75, 0, 20, causal=False),
            Span(5, 75, 158, 228, causal=True),
            Span(75, 76, 20, 153, causal=False),
            Span(75, 76, 228, 229, causal=True),
        )
    )
    logits = fast.output_projection(fast.predict(x, sequences.positions, cache, spans))
    for rest, source, part in zip(rests, sources, logits.split([5, 70, 1]), strict=True):
        whole = torch.cat((texts[source], rest))[None]
        assert_near(part, exact(whole, first=len(texts[source]))[0], fast.dtype)


@torch.inference_mode()
def test_float64_runs_the_references(folder, ids):
    """Which read lengths on the host, so that no graph can hold them."""
    exact = load(folder, device="cpu", dtype=torch.float64)
    model = load(folder, device="cuda", dtype=torch.float64)
    cache, logits = model.new_cache(len(ids)), []
    model.prefill(ids[:200].cuda(), cache)
    decoder = model.decoder(cache)
    decoder.start(int(ids[200]))
    for token in [*ids[201:], 0]:
        decoder.step()
        logits.append(decoder.logits[0].clone())
        decoder.tokens.fill_(token)
    torch.testing.assert_close(
        torch.stack(logits).cpu(), exact(ids[None])[0, 200:], rtol=0, atol=1e-9
    )
