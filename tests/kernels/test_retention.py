"""The three forms of gated retention agree with each other and with the recurrence, in float64."""

import pytest
import torch

from yoco_eval.kernels.retention import (
    retention_chunkwise,
    retention_log_gate,
    retention_parallel,
    retention_recurrent,
)


def inputs(length, batch=2, heads=3, dk=8, dv=6, dtype=torch.float64):
    torch.manual_seed(length)
    q, k = torch.randn(2, batch, heads, length, dk, dtype=dtype)
    v = torch.randn(batch, heads, length, dv, dtype=dtype)
    log_gate = retention_log_gate(4 * torch.randn(batch, heads, length, dtype=dtype))
    state = torch.randn(batch, heads, dk, dv, dtype=dtype)
    return q, k, v, log_gate, state


def by_definition(q, k, v, log_gate, state):
    """o_p = q_p (e^(a_1 + .. + a_p) S_0 + sum_j e^(a_(j+1) + .. + a_p) k_j^T v_j), term by term."""
    out = torch.empty_like(v)
    for p in range(q.shape[2]):
        s = log_gate[:, :, : p + 1].sum(-1).exp()[..., None, None] * state
        for j in range(p + 1):
            decay = log_gate[:, :, j + 1 : p + 1].sum(-1).exp()
            s = s + decay[..., None, None] * k[:, :, j, :, None] * v[:, :, j, None, :]
        out[:, :, p] = (q[:, :, p, None, :] @ s)[..., 0, :]
    return out, s


@pytest.mark.parametrize("length", [1, 2, 7, 33])
@pytest.mark.parametrize("form", [retention_parallel, retention_recurrent, retention_chunkwise])
def test_forms_match_the_definition(form, length):
    args = inputs(length)
    for actual, expected in zip(form(*args), by_definition(*args), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_any_chunk_size(length, chunk_size):
    args = inputs(length)
    actual = retention_chunkwise(*args, chunk_size=chunk_size)
    for a, e in zip(actual, retention_recurrent(*args), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-11)


def test_a_text_may_be_cut_anywhere():
    q, k, v, log_gate, state = inputs(100)
    whole = retention_chunkwise(q, k, v, log_gate, state, chunk_size=16)
    outputs = []
    for cut in (slice(0, 1), slice(1, 38), slice(38, 100)):
        out, state = retention_chunkwise(
            q[:, :, cut], k[:, :, cut], v[:, :, cut], log_gate[:, :, cut], state, chunk_size=16
        )
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 2), whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, whole[1], rtol=0, atol=1e-12)


def test_no_state_is_a_state_of_zeros():
    q, k, v, log_gate, state = inputs(10)
    for form in (retention_parallel, retention_recurrent, retention_chunkwise):
        for a, e in zip(
            form(q, k, v, log_gate), form(q, k, v, log_gate, torch.zeros_like(state)), strict=True
        ):
            assert torch.equal(a, e)


def test_strong_decay_stays_finite_and_right():
    """Gates so closed that the product over a chunk underflows float32."""
    q, k, v, log_gate, state = (x.float() for x in inputs(200))
    log_gate = torch.full_like(log_gate, -20.0)
    out, last = retention_chunkwise(q, k, v, log_gate, state)
    expected, expected_last = retention_recurrent(
        *(x.double() for x in (q, k, v, log_gate, state))
    )
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.double(), expected_last, rtol=1e-5, atol=1e-5)


def test_computes_in_float32_whatever_comes_in():
    args = [x.bfloat16() for x in inputs(50)]
    out, state = retention_chunkwise(*args)
    expected, expected_state = retention_recurrent(*(x.double() for x in args))
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-5, atol=1e-5)
    assert (out.double() - expected).norm() / expected.norm() < 4e-3  # bfloat16's own rounding


def test_log_gate():
    gate = torch.tensor([-30.0, 0.0, 30.0], dtype=torch.float64)
    expected = torch.log(torch.sigmoid(gate)) / 16
    torch.testing.assert_close(retention_log_gate(gate), expected)
    assert retention_log_gate(gate.bfloat16()).dtype == torch.float32
