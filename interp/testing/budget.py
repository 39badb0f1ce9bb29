"""An error budget instead of a hand-set tolerance."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_error_budget(
    got: Tensor, reference64: Tensor, low_precision: Tensor, *, factor: float = 2.0, units: float = 1.0, what: str = "result"
) -> None:  # fmt: skip
    """Assert that ``got`` is no further from fp64 than ``factor`` times PyTorch's own low-precision path, and rounding.

    Args:
        got: the result under test, in a low precision.
        reference64: the same computed in fp64 from the same (low-precision) inputs.
        low_precision: the same computed by PyTorch in the dtype of ``got``.
        factor: how many times worse than PyTorch it may be.
        units: the width of the band.
        what: name of the result in the failure.

    The band is so many units in the last place of ``low_precision``'s dtype at the largest reference value: where PyTorch
    happens to be exact, rounding the right answer must still pass. Infinite entries must be equal.

    Raises:
        AssertionError: shapes differ, NaN or infinity where there should be none, or an error over the budget; the
            message gives both errors and the band.
    """
    if not got.shape == reference64.shape == low_precision.shape:
        raise AssertionError(
            f"{what}: shapes differ: got {tuple(got.shape)}, reference64 {tuple(reference64.shape)}, "
            f"low_precision {tuple(low_precision.shape)}"
        )
    if reference64.dtype != torch.float64:
        raise AssertionError(f"{what}: reference64 must be float64, got {reference64.dtype}")
    reference, got64, low64 = reference64, got.detach().double().to(reference64.device), low_precision.detach().double()
    low64 = low64.to(reference.device)
    finite = torch.isfinite(reference)
    if not torch.equal(got64[~finite], reference[~finite]) and not _same_nan(got64[~finite], reference[~finite]):
        raise AssertionError(f"{what}: differs from the reference where the reference is infinite or NaN")
    if not finite.any():
        return
    got64, low64, reference = got64[finite], low64[finite], reference[finite]
    error = (got64 - reference).abs().max().item()
    base = (low64 - reference).abs().max().item()
    eps = torch.finfo(low_precision.dtype).eps
    band = units * eps * max(reference.abs().max().item(), torch.finfo(low_precision.dtype).tiny)
    limit = factor * base + band
    if not error <= limit:
        worst = int((got64 - reference).abs().nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{what}: error {error:.3e} against fp64 is over the budget {limit:.3e} = {factor:g} x {base:.3e} "
            f"(PyTorch in {low_precision.dtype}) + {band:.3e} (rounding); worst: got {got64[worst].item():.6g}, "
            f"reference {reference[worst].item():.6g}, PyTorch {low64[worst].item():.6g}"
        )


def _same_nan(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
