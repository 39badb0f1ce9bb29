"""Sums along the diagonals of a piece of the map, for histograms of the offset between tokens."""

# pyright: basic, reportGeneralTypeIssues=false

import triton
import triton.language as tl

RUNNING_INTS = ["n_rows", "n_keys", "n_bins", "n_blocks", "n_heads", "first", "row_start", "row_b"]


@triton.jit(do_not_specialize=RUNNING_INTS)
def diagonals_kernel(
    map_ptr, out_ptr, row_ptr, row_b, n_rows, n_keys, n_bins, n_blocks, n_heads, first, row_start,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add to ``out [B * H, n_bins + 1]`` the sums of the map ``[B * H, n_rows, n_keys]`` by ``offset - lo``.

    Row r and key c of the piece have the offset ``lo + first + r - c``. ``row_ptr`` ``[B|1, Lq]`` holds 1 for rows that count; the
    piece begins at row ``row_start`` of them. A program owns its bins, and pieces follow each other: no atomics.
    """
    pid = tl.program_id(0)
    bh = (pid // n_blocks).to(tl.int64)
    bins = pid % n_blocks * BD + tl.arange(0, BD)
    lowest = pid % n_blocks * BD
    highest = tl.minimum(lowest + BD, n_bins) - 1
    # Rows of which any key stands on one of these diagonals.
    start = tl.maximum(lowest - first, 0)
    stop = tl.minimum(highest - first + n_keys, n_rows)
    if start < stop:
        acc = tl.zeros([BR, BD], tl.float32)
        for r0 in tl.range(start, stop, BR):
            rows = r0 + tl.arange(0, BR)
            counts = tl.load(row_ptr + bh // n_heads * row_b + row_start + rows, mask=rows < n_rows, other=0.0) > 0
            cols = first + rows[:, None] - bins[None, :]
            inside = counts[:, None] & (cols >= 0) & (cols < n_keys) & (bins < n_bins)[None, :]
            at = map_ptr + (bh * n_rows + rows[:, None]) * n_keys + cols
            acc += tl.load(at, mask=inside, other=0.0)
        out_at = out_ptr + bh * (n_bins + 1) + bins
        before = tl.load(out_at, mask=bins < n_bins, other=0.0)
        tl.store(out_at, before + tl.sum(acc, 0), mask=bins < n_bins)
