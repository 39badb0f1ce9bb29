"""What every kernel does to one tile of scores: score modifications and visibility.

Scores are kept in units of log2 (``x = s * log2(e)``), so that ``exp2`` needs no further product. A hidden key scores
:data:`HIDDEN` or, in the statistics kernel, less the further it is: finite so that ``p * x`` stays 0 instead of NaN.

In the interpreter (TRITON_INTERPRET=1) bfloat16 is raw bits, on which arithmetic is silently wrong; ``UPCAST`` turns what
was loaded into fp32 first.
"""

# Triton reads annotations, shapes and default arguments of jitted functions itself, which a type checker cannot follow.
# pyright: basic, reportGeneralTypeIssues=false

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1.0e30)
DEAD = tl.constexpr(-1.0e20)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Bits of the table that says what acts on a row.
UNIFORM_BIT = tl.constexpr(1)
SINK_WINDOW_BIT = tl.constexpr(2)
BLOCKS_BIT = tl.constexpr(4)
NEIGHBOURHOOD_BIT = tl.constexpr(8)


@triton.jit
def product(a, b, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b`` in fp32; ``PRECISION`` keeps fp32 operands out of TF32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def product_add(a, b, c, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def capped(s, cap):
    """``cap * tanh(s / cap)``, written with exp2 because the interpreter has no tanh."""
    y = tl.minimum(tl.abs(s) * (2.0 / cap), 60.0)
    e = tl.exp2(-y * LOG2E)
    t = (1.0 - e) / (1.0 + e)
    return tl.where(s < 0, -cap * t, cap * t)


@triton.jit
def by_group(table, row_offset, row_ok, group_of_key, G: tl.constexpr, other):
    """``table[row, group of key]`` as a tile, for a table whose last axis is contiguous and G wide."""
    found = tl.zeros([row_offset.shape[0], group_of_key.shape[0]], tl.float32) + other
    for g in tl.static_range(G):
        value = tl.load(table + row_offset + g, mask=row_ok, other=0.0).to(tl.float32)
        found = tl.where((group_of_key == g)[None, :], value[:, None], found)
    return found


@triton.jit
def dropped(keys, row_offset, row_ok, position, N_DROP: tl.constexpr):
    """True where a row's list names the key's absolute position."""
    found = tl.zeros([row_offset.shape[0], position.shape[0]], tl.int1)
    for n in tl.static_range(N_DROP):
        key = tl.load(keys + row_offset + n, mask=row_ok, other=-1)
        found = found | (key[:, None] == position[None, :])
    return found


@triton.jit
def near(query_coords, key_coords, query_base, key_base, rows, row_ok, cols, col_ok, radius, N_COORDS: tl.constexpr):
    """Chebyshev distance within ``radius``, or either side without a place (a negative coordinate)."""
    within = tl.zeros([rows.shape[0], cols.shape[0]], tl.int1) | True
    placeless = tl.zeros([rows.shape[0], cols.shape[0]], tl.int1)
    for n in tl.static_range(N_COORDS):
        i = tl.load(query_coords + query_base + rows * N_COORDS + n, mask=row_ok, other=-1)
        j = tl.load(key_coords + key_base + cols * N_COORDS + n, mask=col_ok, other=-1)
        within = within & (tl.abs(i[:, None] - j[None, :]) <= radius)
        placeless = placeless | (i < 0)[:, None] | (j < 0)[None, :]
    return within | placeless


@triton.jit
def apart(q_first, q_second, key_at, col_ok, N_COORDS: tl.constexpr, HOP: tl.constexpr):
    """Distances ``[BM, BN]`` of rows at fp32 coordinates (the second one only in 2-D) to keys, and which keys have a place."""
    first = tl.load(key_at, mask=col_ok, other=-1)
    placed = first >= 0
    away = tl.abs(q_first[:, None] - first.to(tl.float32)[None, :])
    if N_COORDS == 2:
        second = tl.load(key_at + 1, mask=col_ok, other=-1)
        placed = placed & (second >= 0)
        along = tl.abs(q_second[:, None] - second.to(tl.float32)[None, :])
        if HOP:  # noqa: SIM108 - a constant decides
            away = tl.maximum(away, along)
        else:
            away = tl.sqrt(away * away + along * along)
    return away, placed


@triton.jit
def seen_keys(
    first_row, last_row, n_keys, delta, left, right, first_real, CAUSAL: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Slots ``lo : hi`` outside which no row of a block sees a key, and ``all_lo : all_hi`` in which every row sees them all.

    Padding between the first real key and the last is not looked at.
    """
    lo = 0
    hi = n_keys
    if CAUSAL:
        hi = tl.minimum(hi, last_row + delta + 1)
    if RIGHT:
        hi = tl.minimum(hi, last_row + delta + right + 1)
    if LEFT:
        lo = tl.maximum(lo, first_row + delta - left)
    if PADDING:
        lo = tl.maximum(lo, first_real)
    hi = tl.maximum(hi, 0)
    all_lo = lo
    all_hi = hi
    if CAUSAL:
        all_hi = tl.minimum(all_hi, first_row + delta + 1)
    if RIGHT:
        all_hi = tl.minimum(all_hi, first_row + delta + right + 1)
    if LEFT:
        all_lo = tl.maximum(all_lo, last_row + delta - left)
    return lo, hi, all_lo, all_hi


@triton.jit
def whole_tiles(lo, hi, all_lo, all_hi, BN: tl.constexpr):
    """The slots that all rows see, cut to whole tiles within ``lo : hi``; ``lo`` begins a tile."""
    all_lo = tl.minimum(tl.cdiv(tl.maximum(all_lo, lo), BN) * BN, tl.cdiv(hi, BN) * BN)
    return all_lo, tl.maximum(tl.minimum(all_hi, hi) // BN * BN, all_lo)


@triton.jit
def finished(top, total, sink, uniform, SINKS: tl.constexpr, UNIFORM: tl.constexpr):
    """The end of a running softmax: rows that saw something, their log2-sum-exp2, and ``exp2(top - lse2)``.

    The last turns sums relative to the largest score into sums of probabilities.
    """
    alive = top > DEAD
    top = tl.where(alive, top, 0.0)
    lse2 = tl.where(alive, top + tl.log2(tl.where(alive, total, 1.0)), float("-inf"))
    if SINKS:
        higher = tl.maximum(lse2, sink)
        with_sink = higher + tl.log2(tl.exp2(lse2 - higher) + tl.exp2(sink - higher))
        if UNIFORM:
            with_sink = tl.where(uniform, lse2, with_sink)
        lse2 = with_sink
    return alive, top, lse2, tl.where(alive, tl.exp2(top - lse2), 0.0)


@triton.jit
def add_whole_tile(N_GROUPS: tl.constexpr, only, in_tile, m0, m1, m2, m3, m4, m5, m6, m7):
    """Masses by key group with the row sums ``[BM]`` of one more tile, all keys of which are of group ``only`` (< 0: nobody's)."""
    m0 += tl.where(only == 0, in_tile, 0.0)
    if N_GROUPS > 1:
        m1 += tl.where(only == 1, in_tile, 0.0)
    if N_GROUPS > 2:
        m2 += tl.where(only == 2, in_tile, 0.0)
    if N_GROUPS > 3:
        m3 += tl.where(only == 3, in_tile, 0.0)
    if N_GROUPS > 4:
        m4 += tl.where(only == 4, in_tile, 0.0)
    if N_GROUPS > 5:
        m5 += tl.where(only == 5, in_tile, 0.0)
    if N_GROUPS > 6:
        m6 += tl.where(only == 6, in_tile, 0.0)
    if N_GROUPS > 7:
        m7 += tl.where(only == 7, in_tile, 0.0)
    return m0, m1, m2, m3, m4, m5, m6, m7


@triton.jit
def add_mixed_tile(N_GROUPS: tl.constexpr, kind, p, m0, m1, m2, m3, m4, m5, m6, m7):
    """Masses by key group with one more tile ``p [BM, BN]`` of keys of the groups ``kind [BN]``, negative for nobody's."""
    m0 += tl.sum(tl.where((kind == 0)[None, :], p, 0.0), 1)
    if N_GROUPS > 1:
        m1 += tl.sum(tl.where((kind == 1)[None, :], p, 0.0), 1)
    if N_GROUPS > 2:
        m2 += tl.sum(tl.where((kind == 2)[None, :], p, 0.0), 1)
    if N_GROUPS > 3:
        m3 += tl.sum(tl.where((kind == 3)[None, :], p, 0.0), 1)
    if N_GROUPS > 4:
        m4 += tl.sum(tl.where((kind == 4)[None, :], p, 0.0), 1)
    if N_GROUPS > 5:
        m5 += tl.sum(tl.where((kind == 5)[None, :], p, 0.0), 1)
    if N_GROUPS > 6:
        m6 += tl.sum(tl.where((kind == 6)[None, :], p, 0.0), 1)
    if N_GROUPS > 7:
        m7 += tl.sum(tl.where((kind == 7)[None, :], p, 0.0), 1)
    return m0, m1, m2, m3, m4, m5, m6, m7


@triton.jit
def in_groups(GROUPS: tl.constexpr, m0, m1, m2, m3, m4, m5, m6, m7):
    """The mass of a set of groups, given as bits."""
    found = m0 * 0.0
    if GROUPS & 1:
        found += m0
    if GROUPS & 2:
        found += m1
    if GROUPS & 4:
        found += m2
    if GROUPS & 8:
        found += m3
    if GROUPS & 16:
        found += m4
    if GROUPS & 32:
        found += m5
    if GROUPS & 64:
        found += m6
    if GROUPS & 128:
        found += m7
    return found
