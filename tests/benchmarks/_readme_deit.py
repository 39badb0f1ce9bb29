"""The heads of DeiT-tiny on photographs, as the README shows them."""

from __future__ import annotations

from typing import Any

from _results import recorded, table

Row = dict[str, Any]


def deit(content: dict[str, Any]) -> str:
    rows = {row["what"]: row for row in content["rows"]}
    heads = [row for row in content["rows"] if "overlap" in row and row["what"].startswith("L")]
    last = max(int(row["what"][1:].split("H")[0]) for row in heads)

    def mean(layer: int, name: str) -> float:
        values = [row[name] for row in heads if row["what"].startswith(f"L{layer}H")]
        return sum(values) / len(values)

    strongest = min(heads, key=lambda row: row["change of log-probability"])
    itself = max(heads, key=lambda row: row["mass on itself"])
    ranks = rows["rank correlation with |change|"]
    lines = [
        f"**DeiT-tiny** ({recorded(content)}).",
        "",
        (
            f"The class token's rows on {heads[0]['n']} photographs. What a head looks at depends on the picture more and more: two "
            f"photographs' rows overlap by {mean(0, 'overlap'):.2f} in layer 0 and {mean(last, 'overlap'):.2f} in layer {last}, while the "
            f"patches of the same layers look {mean(0, 'distance of patches'):.1f} and "
            f"{mean(last, 'distance of patches'):.1f} patches far. In {itself['what']} the class token keeps "
            f"{itself['mass on itself']:.0%} of its attention for itself. Its entropy is {mean(last, 'entropy'):.2f} nats in layer {last}, "
            f"{mean(last, 'entropy, patches shuffled'):.2f} where the patches are shuffled. Zeroing one head in the class token's row "
            f"moves the prediction little, at most {strongest['change of log-probability']:.2f} "
            f"(se {strongest['change of log-probability, se']:.2f}) nats ({strongest['what']}). What failed as evidence: the size of that "
            f"change goes with low overlap (rank correlation {ranks['overlap']:.2f} over {ranks['n']} heads), but with depth alone as well "
            f"({ranks['layer']:.2f})."
        ),
        "",
        _importance(heads, rows["importance"]),
        "",
        *_sets([row for row in content["rows"] if "heads pruned together" in row["what"]]),
        "",
        _hops(heads, rows["a head that looks at all patches alike"]["mean hop"]),
    ]
    return "\n".join(lines)


def _importance(heads: list[Row], found: Row) -> str:
    ordered = sorted(heads, key=lambda row: -row["JSD, bits"])
    first = ", ".join(
        f"{r['what']} {r['JSD, bits']:.4f} [{r['JSD, low']:.4f}, {r['JSD, high']:.4f}]" for r in ordered[:5]
    )
    beyond = sum(row["JSD, low"] > ordered[len(ordered) // 2]["JSD, bits"] for row in heads)
    return (
        f"A demonstration on {found['n']} photographs, not a finding about images: importance of a head as the Jensen-Shannon divergence "
        f"of the class probabilities when it is pruned (all rows), in bits [95 % by photograph, too narrow at so few]: {first}; median of "
        f"the {len(heads)} heads {ordered[len(ordered) // 2]['JSD, bits']:.4f}, and {beyond} heads' intervals lie above it. With nothing "
        f"pruned it is {found['largest JSD with nothing pruned']:.1g}. On as many other photographs the ranking would repeat with "
        f"{found['split-half reliability']:.2f} (split-half; {found['split-half reliability within layers']:.2f} within layers). It goes "
        f"with depth by {found['rank correlation with layer']:.2f} and with what the head writes by "
        f"{found['rank correlation with write norm']:.2f} (rank correlations)."
    )


def _sets(rows: list[Row]) -> list[str]:
    header = ["found on", "pruned together", "on others", "JSD, bits (se)", "layer-matched: mean (largest)",
              "norm-matched: mean (largest)", "p layer / norm"]  # fmt: skip
    body = [
        [
            str(row["found on"]), row["heads"], str(row["n"]), f"{row['JSD, bits']:.4f} ({row['se']:.4f})",
            f"{row['layer-matched mean']:.4f} ({row['layer-matched largest']:.4f})",
            f"{row['norm-matched mean']:.4f} ({row['norm-matched largest']:.4f})",
            f"{row['p against layer-matched']:.2f} / {row['p against norm-matched']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    n = rows[0]["sets of each control"]
    weak = {name: sum(row[f"{name}-matched largest"] >= row["JSD, bits"] for row in rows) for name in ("layer", "norm")}
    failed = (
        f"What failed: in {weak['layer']} of {len(rows)} halves some random set of the same layers costs as much, in {weak['norm']} some "
        "set of like write norm: so few photographs do not tell the first heads from others early in the network."
    )
    intro = (
        f"Found on one half of the photographs, pruned together on the other, against {n} random sets (smallest p 1/{n + 1}; three "
        "heads a layer leave few different sets of the same layers):"
    )
    return [
        intro,
        "",
        *table(header, body),
        *(["", failed] if any(weak.values()) else []),
    ]


def _hops(heads: list[Row], uniform: float) -> str:
    near, far = (pick(heads, key=lambda row: row["mean hop"]) for pick in (min, max))
    layers = [row["what"][1:].split("H")[0] for row in heads]
    by_layer = {n: [r for r, one in zip(heads, layers, strict=True) if one == n] for n in dict.fromkeys(layers)}
    mean = {n: sum(r["mean hop"] for r in rows) / len(rows) for n, rows in by_layer.items()}
    local = [row for row in heads if row["mean hop"] < uniform / 2]
    kept = [row for row in local if row["mean hop, patches shuffled"] < uniform / 2]
    return (
        f"k-hop profile of the patches' rows (ring k: Chebyshev distance k; a head that looks at all alike: mean ring {uniform:.2f}): "
        f"{near['what']} looks nearest, mean ring {near['mean hop']:.2f} (se {near['mean hop, se']:.2f}; "
        f"{near['mass within one hop']:.0%} within one ring), {far['what']} farthest, {far['mean hop']:.2f}. Mean by layer: "
        f"{', '.join(f'{value:.1f}' for value in mean.values())}. {len(local)} heads have less than half the ring of the even head; with "
        f"the patches in random order {len(kept)} of them still have: these follow place; the nearness of the other "
        f"{len(local) - len(kept)} comes from what neighbours look like."
    )
