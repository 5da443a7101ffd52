"""Triton kernels run on the GPU where there is one, else in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def head_by_head():
    """Lays x [T, H, ...] out anew, one head behind the other, where kernels may expect rows."""

    def lay_out(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    return lay_out


@pytest.fixture(autouse=True)
def returned_memory():
    """Gives a card's memory back: some tests take most of it, and others run beside them."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request, device) -> torch.dtype:
    """Of a kernel's inputs."""
    if request.param == "bfloat16" and device == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    return getattr(torch, request.param)


@pytest.fixture
def close(dtype):
    """Asserts a kernel's output near its float64 reference: relative error in norm."""
    limit = 1e-5 if dtype == torch.float32 else 1e-2

    def check(output: torch.Tensor, reference: torch.Tensor) -> None:
        assert output.shape == reference.shape
        error = (output.double() - reference.double()).norm() / reference.double().norm()
        assert error < limit, f"relative error {error:.2e}"  # NaN fails, too

    return check
