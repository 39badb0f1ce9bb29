"""The op against an independent oracle: plain loops over samples, heads and rows in float64 numpy.

The oracle shares no code with the op. Every edit, readout and kind of mask is met alone, and then in random company.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from interp.attention import (
    Blocks,
    Boost,
    DropKeys,
    Gain,
    GivenRows,
    GroupWeights,
    Mask,
    Neighbourhood,
    OffsetBins,
    Readout,
    Redistribute,
    SinkWindow,
    Temperature,
    Threshold,
    TopKeys,
    Uniform,
    attend,
    blockwise,
)
from interp.testing.attention_cases import EDITS, MASKS, SCORES, Case, Maker

# The oracle


def at(table: Any, *where: int) -> Any:
    """A number, or the entry of a tensor whose axes may be 1 wide."""
    if not isinstance(table, torch.Tensor):
        return table
    array = (table.double() if table.is_floating_point() else table).numpy()
    return array[tuple(min(x, n - 1) for x, n in zip(where, array.shape, strict=False))]


def acts(op: Any, b: int, h: int, r: int) -> bool:
    return op.where is None or bool(at(op.where, b, h, r))


def visible_by_mask(mask: Mask, b: int, r: int, n_keys: int, h: int) -> np.ndarray:
    i = mask.q_offset + r
    seen = np.ones(n_keys, bool)
    for c in range(n_keys):
        j = mask.kv_offset + c
        if mask.causal and j > i:
            seen[c] = False
        if mask.window is not None:
            left, right = mask.window
            if (left is not None and j < i - left) or (right is not None and j > i + right):
                seen[c] = False
        if mask.padding is not None and not at(mask.padding, b, c):
            seen[c] = False
        if mask.rule is not None and not mask.rule(torch.tensor(b), torch.tensor(0), torch.tensor(i), torch.tensor(j)):
            seen[c] = False
        if mask.dense is not None and not at(mask.dense, b, h, r, c):
            seen[c] = False
    return seen


def restricted(op: Any, mask: Mask, b: int, h: int, r: int, s: np.ndarray) -> np.ndarray:
    keep = np.ones(len(s), bool)
    i = mask.q_offset + r
    first = 0 if mask.first is None else int(at(mask.first, b))
    for c in range(len(s)):
        j = mask.kv_offset + c
        if isinstance(op, SinkWindow):
            keep[c] = j - first < at(op.sink, h) or i - j < at(op.window, h)
        elif isinstance(op, Blocks):
            keep[c] = at(op.allowed, h, i // op.block, j // op.block)
        elif isinstance(op, Neighbourhood):
            here, there = at(op.query_coords, b, r), at(op.key_coords, b, c)
            placeless = (here < 0).any() or (there < 0).any()
            keep[c] = placeless or max(abs(here - there)) <= at(op.radius, h)
        elif isinstance(op, Threshold):
            keep[c] = s[c] >= at(op.value, b, h, r)
        elif isinstance(op, DropKeys):
            keep[c] = j not in at(op.keys, b, h, r).tolist()
    return keep


def oracle_row(case: Case, b: int, h: int, r: int) -> dict[str, Any]:
    q, k, mask, edit = case["q"], case["k"], case["mask"], case["edit"]
    kv = h // (q.shape[1] // k.shape[1])
    n_keys = k.shape[2]
    s = case["scale"] * (k[b, kv].double().numpy() @ q[b, h, r].double().numpy())
    for op in edit.operations:
        if isinstance(op, Temperature) and acts(op, b, h, r):
            s = s / float(at(op.value, b, h, r))
    if case["softcap"]:
        s = case["softcap"] * np.tanh(s / case["softcap"])
    seen = visible_by_mask(mask, b, r, n_keys, h)
    if case["bias"] is not None:
        for c in range(n_keys):
            entry = float(at(case["bias"], b, h, r, c))
            if entry <= torch.finfo(case["bias"].dtype).min / 2:
                seen[c] = False
            else:
                s[c] += entry
    groups = np.array([0 if edit.groups is None else at(edit.groups, b, c) for c in range(n_keys)])
    for op in edit.operations:
        if isinstance(op, Boost) and acts(op, b, h, r):
            s = s + at(op.beta, b, h, r)[groups] * np.abs(s)
    for op in edit.operations:
        if isinstance(op, SinkWindow | Blocks | Neighbourhood | Threshold | DropKeys) and acts(op, b, h, r):
            seen &= restricted(op, mask, b, h, r, s)
    for op in edit.operations:
        if isinstance(op, TopKeys) and acts(op, b, h, r):
            falling = [c for c in np.argsort(-s) if seen[c]]
            top = falling[: op.k]
            if op.draws is None:
                gone = falling[op.k :]
            else:
                draws = at(op.draws, b, h, r)[: len(top)].tolist()
                by_draw = [top[c] for c in np.argsort(draws)]
                count = int(len(top) * op.share) if op.exact else sum(draw < op.share for draw in draws)
                gone = by_draw[: max(min(count, len(falling) - 1), 0)]
            seen[gone] = False
    exponentials = np.where(seen, np.exp(s), 0.0)
    sink = 0.0 if case["sinks"] is None else math.exp(float(case["sinks"][h]))
    total = exponentials.sum() + sink
    p = exponentials / total if total else exponentials
    share = sink / total if total else 0.0
    lse = math.log(total) if total else -math.inf
    for op in edit.operations:
        if isinstance(op, Uniform) and acts(op, b, h, r):
            p, share = (seen / seen.sum() if seen.any() else np.zeros(n_keys)), 0.0
        if isinstance(op, GivenRows) and h in op.heads.tolist() and r in op.rows.tolist():
            p = at(op.p, b, op.heads.tolist().index(h), op.rows.tolist().index(r)).astype(float)
            share = 0.0
    row_group = 0 if edit.query_groups is None else int(at(edit.query_groups, b, r))
    for op in edit.operations:
        if isinstance(op, GroupWeights) and acts(op, b, h, r):
            held = p.sum() + share
            p = p * at(op.weight, b, h, row_group)[groups].astype(float)
            if op.renormalise:
                left = p.sum() + share
                p, share = (p * held / left, share * held / left) if left else (0 * p, 0.0)
        if isinstance(op, Redistribute) and acts(op, b, h, r):
            source, target, gate, part = (
                p[np.isin(groups, g)].sum() for g in (op.source, op.target, op.gate_mass, op.gate_share)
            )
            if gate >= op.summ and part >= op.rho * gate and source > 0 and target > 0:
                fraction = float(at(op.fraction, b, h, r))
                p = p.copy()
                p[np.isin(groups, op.source)] *= 1 - fraction
                p[np.isin(groups, op.target)] *= 1 + fraction * source / target
    gain = 1.0
    for op in edit.operations:
        if isinstance(op, Gain) and acts(op, b, h, r):
            gain *= float(at(op.value, b, h, r))
    return {"p": p, "share": share, "lse": lse, "seen": seen, "gain": gain, "v": case["v"][b, kv].double().numpy()}


def oracle(case: Case) -> dict[str, np.ndarray]:
    batch, heads, n_queries, _ = case["q"].shape
    n_keys, width = case["k"].shape[2], case["v"].shape[3]
    asked: Readout = case["readout"]
    heads_read = range(heads) if asked.heads is None else asked.heads.tolist()
    rows = {
        (b, n, r): oracle_row(case, b, h, r)
        for b in range(batch)
        for n, h in enumerate(heads_read)
        for r in range(n_queries)
    }
    all_rows = (
        rows
        if asked.heads is None
        else {
            (b, h, r): oracle_row(case, b, h, r) for b in range(batch) for h in range(heads) for r in range(n_queries)
        }
    )
    z = np.zeros((batch, n_queries, heads, width))
    for (b, h, r), row in all_rows.items():
        z[b, r, h] = row["gain"] * row["p"] @ row["v"]
    lead = (batch, len(heads_read))
    edge = 1
    while edge < max(n_queries, n_keys) / max(asked.pooled, 1):
        edge *= 2
    bins: OffsetBins = asked.offset
    spans = [hi - lo + 1 for lo, hi in zip(bins.lo, bins.hi, strict=True)]
    out = {
        "output": z,
        **{name: np.zeros((*lead, n_queries)) for name in ("lse", "top_weight", "top_key", "entropy", "sink_share")},
        "mass": np.zeros((*lead, n_queries, asked.n_groups)),
        "topk_weight": np.zeros((*lead, n_queries, asked.topk)),
        "topk_key": np.full((*lead, n_queries, asked.topk), -1),
        "group_output": np.zeros((*lead, len(asked.group_output), asked.n_groups, width)),
        "received": np.zeros((*lead, asked.n_query_groups, n_keys)),
        "received_rows": np.zeros((*lead, asked.n_query_groups, n_keys), int),
        "pooled": np.zeros((*lead, math.ceil(n_queries / edge), math.ceil(n_keys / edge))),
        "offset": np.zeros((*lead, math.prod(spans) + 1)),
        "distance": np.zeros((*lead, n_queries)),
        "distance_mass": np.zeros((*lead, n_queries)),
        "rows": np.zeros((*lead, len(asked.rows), n_keys)),
        "attention": np.zeros((*lead, n_queries, n_keys)),
    }
    for (b, n, r), row in rows.items():
        p, place = row["p"], (b, n, r)
        out["attention"][place], out["lse"][place], out["sink_share"][place] = p, row["lse"], row["share"]
        out["entropy"][place] = -sum(x * math.log(x) for x in p if x > 0)
        order = sorted(range(n_keys), key=lambda c: (-p[c], c))
        out["top_weight"][place] = p[order[0]]
        out["top_key"][place] = case["mask"].kv_offset + order[0] if p[order[0]] > 0 else -1
        for m, c in enumerate(order[: asked.topk]):
            if p[c] > 0:
                out["topk_weight"][(*place, m)], out["topk_key"][(*place, m)] = p[c], case["mask"].kv_offset + c
        query_group = 0 if asked.query_groups is None else int(at(asked.query_groups, b, r))
        here = at(bins.query_coords, b, r)
        for c in range(n_keys):
            group = 0 if asked.groups is None else int(at(asked.groups, b, c))
            out["mass"][(*place, group)] += p[c]
            for m in (m for m, x in enumerate(asked.group_output.tolist()) if x == r):
                out["group_output"][b, n, m, group] += row["gain"] * p[c] * row["v"][c]
            there = at(bins.key_coords, b, c)
            if (here >= 0).all() and (there >= 0).all():
                gaps = [abs(int(x) - int(y)) for x, y in zip(here, there, strict=True)]
                out["distance"][place] += p[c] * (max(gaps) if asked.distance.hop else math.hypot(*gaps))
                out["distance_mass"][place] += p[c]
            if query_group < 0:
                continue
            out["received"][b, n, query_group, c] += p[c]
            out["received_rows"][b, n, query_group, c] += row["seen"][c]
            out["pooled"][b, n, r // edge, c // edge] += p[c]
            if (here < 0).any() or (there < 0).any():
                out["offset"][b, n, -1] += p[c]
            else:
                steps = [x - y - lo for x, y, lo in zip(here, there, bins.lo, strict=True)]
                if all(0 <= step < span for step, span in zip(steps, spans, strict=True)):
                    out["offset"][b, n, np.ravel_multi_index(steps, spans)] += p[c]
        for m in (m for m, x in enumerate(asked.rows.tolist()) if x == r):
            out["rows"][b, n, m] = p
    return out


def one_by_one() -> list[Any]:
    """Every mask with every edit, the score variants in turn; and every edit with every score variant."""
    pairs = [(m, e, SCORES[n % len(SCORES)]) for n, (m, e) in enumerate(itertools.product(MASKS, EDITS))]
    pairs += [("causal", e, s) for e, s in itertools.product(EDITS, SCORES)]
    return [pytest.param(n, m, (e,), (s,), id=f"{m}-{e}-{s}") for n, (m, e, s) in enumerate(pairs)]


def in_company() -> list[Any]:
    """Random companies of up to five edits and three score variants."""
    drawn = []
    for seed in range(1000, 1080):
        random = np.random.default_rng(seed)
        edits = tuple(random.choice(EDITS, size=random.integers(2, 6)).tolist())
        scores = tuple(random.choice(SCORES, size=random.integers(1, 4)).tolist())
        drawn.append(pytest.param(seed, str(random.choice(MASKS)), edits, scores, id=f"random{seed}"))
    return drawn


def results(case: Case, backend: str) -> dict[str, np.ndarray]:
    output, readings = attend(**case, backend=backend)
    assert output is not None
    return {"output": output.double().numpy(), **{name: x.double().numpy() for name, x in readings.tensors().items()}}


def assert_same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], atol: float) -> None:
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        assert got[name].shape == values.shape, name
        np.testing.assert_allclose(got[name], values, atol=atol, rtol=atol, err_msg=name)


@pytest.mark.parametrize(("seed", "mask", "edits", "scores"), one_by_one() + in_company())
def test_reference_and_blockwise_equal_the_oracle(
    seed: int, mask: str, edits: tuple[str, ...], scores: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Maker(seed).case(mask, edits, scores)
    wanted = oracle(case)
    assert_same(results(case, "reference"), wanted, atol=1e-11)
    # A few rows of one head a tile, or several heads; and all of a call in one tile.
    for tile_bytes in (1 if seed % 3 == 0 else 700, 1 << 20):
        monkeypatch.setitem(blockwise.TILE_BYTES, "cpu", tile_bytes)
        assert_same(results(case, "blockwise"), wanted, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("seed", "mask", "edits", "scores"), in_company()[::8])
def test_low_precision_inputs(
    seed: int,
    mask: str,
    edits: tuple[str, ...],
    scores: tuple[str, ...],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Computed in fp32 from the rounded inputs, so only the output is rounded to their dtype.
    case = Maker(seed, dtype).case(mask, edits, scores)
    wanted = oracle(case)
    monkeypatch.setitem(blockwise.TILE_BYTES, "cpu", 700)
    for backend in ("reference", "blockwise"):
        got = results(case, backend)
        output, exact = got.pop("output"), wanted["output"]
        np.testing.assert_allclose(output, exact, atol=1e-5, rtol=1e-5 + torch.finfo(dtype).eps)
        # Which of two nearly equal keys is first may turn on the last bit; its weight may not.
        keys = [got.pop(name) for name in ("top_key", "topk_key")]
        slots = np.maximum(keys[1].astype(int) - case["mask"].kv_offset, 0)
        weights = np.take_along_axis(wanted["attention"], slots, -1)
        np.testing.assert_allclose(weights * (keys[1] >= 0), wanted["topk_weight"], atol=1e-5)
        np.testing.assert_array_equal(keys[0], keys[1][..., 0])
        assert_same(got, {name: x for name, x in wanted.items() if name in got}, atol=1e-5)
