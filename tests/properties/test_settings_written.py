"""A setting as text, as JSON and as objects is one setting."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dashboards.specs import build_all
from interp.evaluation.settings import Setting, SettingError, parse_setting

heads = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=3, unique=True).map(
    lambda pairs: ",".join(f"L{layer}H{head}" for layer, head in pairs)
)
shares = st.floats(0, 1, allow_nan=False).map(lambda x: round(x, 3))
scopes = st.sampled_from(["all", "prefill", "decode"])
METHODS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "VHR": {"alpha": st.floats(1, 4).map(lambda x: round(x, 2))},
    "VAR": {"p": shares, "rho": shares, "tau": st.integers(2, 20)},
    "PAINT": {"alpha": shares, "beta": shares},
    "MaskHeads": {"heads": heads, "kind": st.sampled_from(["zero", "uniform", "first_token"]), "scope": scopes},
    "ScaleHeads": {"heads": heads, "gain": st.floats(0, 3).map(lambda x: round(x, 2)), "scope": scopes},
    "TopKMask": {"heads": heads, "k": st.integers(1, 32), "mode": st.sampled_from(["drop", "keep"]), "seed": st.integers(0, 9)},
}  # fmt: skip


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """``{name, settings}``, some settings left to their default."""
    name = draw(st.sampled_from(sorted(METHODS)))
    given_ = {
        key: draw(values) for key, values in METHODS[name].items() if key in ("heads", "gain") or draw(st.booleans())
    }
    return {"name": name, "settings": given_}


def written(spec: dict[str, Any], order: list[str], space: str = "") -> str:
    parts = [f"{key}{space}={space}{spec['settings'][key]!r}" for key in order]
    return f"{spec['name']}({(',' + space).join(parts)})"


def known(spec: dict[str, Any]) -> bool:
    import inspect

    from interp.evaluation.settings import methods

    return set(spec["settings"]) <= set(inspect.signature(methods()[spec["name"]]).parameters)


@settings(max_examples=50)
@given(
    st.lists(specs(), min_size=1, max_size=3),
    st.integers(1, 5),
    st.none() | st.integers(0, 99),
    st.randoms(use_true_random=False),
)
def test_text_json_and_objects_agree(some: list[dict[str, Any]], beams: int, seed: int | None, random: Any) -> None:
    assert all(map(known, some)), "a setting of METHODS is no longer one of the class"
    options = ([f"beam={beams}"] if beams > 1 else []) + ([f"random={seed}"] if seed is not None else [])
    read = parse_setting("+".join([written(spec, list(spec["settings"])) for spec in some] + options))
    assert (read.beams, read.random, len(read.interventions)) == (beams, seed, len(some))
    assert [i.describe()["name"] for i in read.interventions] == [spec["name"] for spec in some]
    # In another order of keywords, with blanks and with the options in front.
    shuffled = [random.sample(list(spec["settings"]), len(spec["settings"])) for spec in some]
    other = " + ".join([*options, *(written(spec, keys, " ") for spec, keys in zip(some, shuffled, strict=True))])
    assert parse_setting(other).key == read.key and parse_setting(f"  {other} ").describe() == read.describe()
    # What the page exports, through a file.
    made = tuple(build_all(json.loads(json.dumps(some))))
    assert Setting("of JSON", made, beams, seed).key == read.key
    # What is recorded is JSON.
    assert json.loads(json.dumps(read.describe(), allow_nan=False)) == read.describe()


@settings(max_examples=40)
@given(specs(), st.data())
def test_a_changed_value_is_another_setting(spec: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(METHODS[spec["name"]])))
    old, new = (data.draw(METHODS[spec["name"]][key]) for _ in range(2))
    pair = [
        parse_setting(written({**spec, "settings": {**spec["settings"], key: v}}, [*{**spec["settings"], key: v}]))
        for v in (old, new)
    ]
    assert (pair[0].key == pair[1].key) == (old == new)


@settings(max_examples=150)
@given(st.text(st.sampled_from("VHRMaskeds(L3H1)=+,.'\" 0[]{}beamrandom"), max_size=24) | st.text(max_size=10))
def test_any_text_is_read_or_refused_with_what_was_got(text: str) -> None:
    read, said = None, ""
    try:
        read = parse_setting(text)
    except SettingError as error:
        said = str(error)
    if read is None:
        assert "must" in said or ":" in said
        return
    assert parse_setting(read.name).key == read.key
