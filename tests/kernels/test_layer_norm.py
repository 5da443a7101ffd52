"""LayerNorm against its equation, and the Triton kernel against the reference in float64."""

import pytest
import torch

from yoco_eval.kernels.layer_norm import layer_norm, layer_norm_reference

EPS = 1e-3


def arguments(tokens, width, dtype=torch.float64, device="cpu"):
    """A stream, weight, bias, and what is added to the stream."""
    torch.manual_seed(width)
    wide = torch.promote_types(dtype, torch.float32)
    x = (3 + 2 * torch.randn(tokens, width + 3)).to(device, wide)[:, :width]
    return x, *(torch.randn(shape).to(device, dtype) for shape in (width, width, (tokens, width)))


@pytest.mark.parametrize("added", [True, False])
def test_equation(added):
    x, weight, bias, add = arguments(5, 7)
    stream = x + add if added else x.clone()
    out = layer_norm(x, weight, bias, EPS, add if added else None)
    centred = stream - stream.mean(-1, keepdim=True)
    size = (centred.square().sum(-1, keepdim=True) / 7 + EPS).sqrt()
    torch.testing.assert_close(out, centred / size * weight + bias)
    assert torch.equal(x, stream)


def test_the_stream_is_rounded_once_it_is_summed():
    """A stream of float32 keeps what bfloat16 would not; the norm does not see it."""
    x, weight, bias, add = arguments(5, 64, torch.bfloat16)
    stream = x + add.float()
    out = layer_norm(x, weight, bias, EPS, add)
    assert torch.equal(x, stream) and out.dtype == torch.bfloat16
    assert torch.equal(out, layer_norm(x.bfloat16(), weight, bias, EPS))


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("shape", [(1, 2560), (13, 100), (3, 5), (0, 8)], ids=str)
def test_triton(shape, device, dtype, close, added):
    pytest.importorskip("triton")
    from yoco_eval.kernels.layer_norm_triton import layer_norm as fast

    x, weight, bias, add = arguments(*shape, dtype, device)
    stream = x + add.float() if added else x.clone()
    out = fast(x, weight, bias, EPS, add if added else None)
    assert torch.equal(x, stream) and out.dtype == dtype
    rounded = stream.to(dtype).double()
    expected = layer_norm_reference(rounded, weight.double(), bias.double(), EPS)
    assert out.shape == expected.shape
    if len(x):
        close(out, expected)
