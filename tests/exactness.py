"""How exact an op must be."""

from __future__ import annotations

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def assert_as_exact(
    ours: torch.Tensor, theirs: torch.Tensor, oracle: torch.Tensor, what: str, terms: int = 1, size: float = 0
) -> None:
    """`ours` may be off the float64 `oracle` by at most twice what PyTorch's own result `theirs` in the same dtype is,
    plus a band: one rounding of the largest value, or the random walk of `terms` roundings (half a unit each) of a sum
    kept in float32, or in float64 where the inputs are (four times that: there the oracle walks too, and one of two
    walks of a few steps is often twice the expected length). `size`: of the terms, where they cancel."""
    assert ours.shape == oracle.shape, f"{what}: {tuple(ours.shape)} for {tuple(oracle.shape)}"
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    if not oracle.numel():
        return
    kept = torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps
    band = max(torch.finfo(ours.dtype).eps, terms**0.5 / 2 * kept * (4 if ours.dtype == torch.float64 else 1)) * max(
        oracle.abs().max().item(), size
    )
    error, allowed = (ours.double() - oracle).abs().max().item(), (theirs.double() - oracle).abs().max().item()
    assert error <= 2 * allowed + band, f"{what}: error {error:.3g}, PyTorch's own {allowed:.3g}, band {band:.3g}"


def value_and_grads(function, *inputs):
    """Output and the gradients of sum(output * fixed weights), fixed by shape, for every input that is a tensor."""
    inputs = [t.detach().clone().requires_grad_() if torch.is_tensor(t) else t for t in inputs]
    out = function(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    tensors = [t for t in inputs if torch.is_tensor(t)]
    return out.detach(), torch.autograd.grad(out, tensors, weights)
