"""What a trace holds, by variable: values worked out from the full map, dims and coordinates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.models.layout import KINDS
from interp.testing import build
from interp.tracing import Intervention, recorder

LENGTH = 10
PREFILL = ("sample", "layer", "head")


@pytest.fixture(scope="module")
def llama() -> Any:
    specimen = build("llama")
    specimen.module.generation_config.eos_token_id = None
    specimen.module.generation_config.pad_token_id = 0
    return specimen


def forward(specimen: Any, capture: interp.Capture, inputs: dict[str, torch.Tensor] | None = None) -> interp.Trace:
    with torch.no_grad(), interp.hooked(specimen.module, capture=capture) as run:
        specimen.module(**(inputs or {"input_ids": specimen.inputs["input_ids"][:, :LENGTH]}))
    return run.trace


def generated(specimen: Any, capture: interp.Capture) -> tuple[interp.Trace, torch.Tensor]:
    with interp.hooked(specimen.module, capture=capture) as run:
        ids = specimen.inputs["input_ids"][:1, :LENGTH]
        out = specimen.module.generate(ids, max_new_tokens=5, do_sample=False)
    return run.trace, out


def close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def blocks(p: np.ndarray, edge: int) -> np.ndarray:
    """Block sums of the last two axes."""
    for axis in (-2, -1):
        p = np.add.reduceat(p, np.arange(0, p.shape[axis], edge), axis=axis)
    return p


def test_exact_rows_are_rows_of_the_map(llama: Any) -> None:
    data = forward(llama, interp.Capture(attention=True, rows=[0, 3, -1]))["text"]
    assert data["row_attention"].dims == (*PREFILL, "row", "key")
    assert data["row"].values.tolist() == [0, 3, LENGTH - 1]
    close(data["row_attention"].values, data["attention"].values[..., [0, 3, LENGTH - 1], :])


def test_a_prompt_may_have_fewer_keys_than_are_asked_for(llama: Any) -> None:
    with interp.hooked(llama.module, capture=interp.Capture(attention=True, topk=8)) as run:
        llama.module.generate(llama.inputs["input_ids"][:1, :5], max_new_tokens=6, do_sample=False)
    data = run.trace["text"]
    p = data["attention"].values
    assert p.shape[-2:] == (10, 10)
    close(data["topk_weight"].values, -np.sort(-p, -1)[..., :8])
    key = data["topk_key"].values
    seen = np.arange(8) <= np.arange(10)[:, None]
    assert ((key >= 0) == seen).all()
    close(np.take_along_axis(p, np.maximum(key, 0), -1)[..., seen], data["topk_weight"].values[..., seen])


def test_z_is_what_the_output_projection_gets(llama: Any) -> None:
    seen: list[torch.Tensor] = []
    layers = llama.module.model.layers
    handles = [x.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for x in layers]
    data = forward(llama, interp.Capture(z=True))["text"]
    for handle in handles:
        handle.remove()
    assert data["z"].dims == (*PREFILL, "query", "dim")
    _, n_layers, heads, _, width = data["z"].shape
    assert heads != width  # else a swap of the two axes would not show
    for layer in range(n_layers):
        close(data["z"].values[:, layer].swapaxes(1, 2), seen[layer].view(1, LENGTH, heads, width))


def test_pooled_is_block_sums_of_the_prefill(llama: Any) -> None:
    trace, _ = generated(llama, interp.Capture(attention=True, pooled=4))
    data = trace["text"]
    assert data["pooled"].dims == (*PREFILL, "query_block", "key_block")
    assert int(data["block_edge"]) == 4  # the smallest power of two >= 10 / 4
    close(data["pooled"].values, blocks(data["attention"].values[..., :LENGTH, :LENGTH], 4))


def test_a_packed_tower_is_pooled_as_one_sequence() -> None:
    specimen = build("qwen2_5_vl")
    data = forward(specimen, interp.Capture(attention=True, pooled=8, stacks=["vision"]), specimen.inputs)["vision"]
    length = data.sizes["query"]
    assert (length, int(data["block_edge"])) == (72, 16)
    assert data["pooled"].dims == (*PREFILL, "query_block", "key_block")
    assert data["pooled"].shape[-2:] == (5, 5)
    close(data["pooled"].values, blocks(np.nan_to_num(data["attention"].values), 16))


def by_offset(p: np.ndarray, special: np.ndarray) -> np.ndarray:
    """Sums of ``p [..., query, key]`` by query minus key, and what touches a special token at the end."""
    touched = special[:, None] | special[None]
    plain = np.where(touched, 0.0, p)
    lines = [np.trace(plain, -offset, -2, -1) for offset in range(len(special))]
    return np.stack([*lines, (p * touched).sum((-2, -1))], -1)


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
def test_offsets_of_tokens(generate: bool, llama: Any) -> None:
    capture = interp.Capture(attention=True, offset=True)
    data = (generated(llama, capture)[0] if generate else forward(llama, capture))["text"]
    length = data.sizes["query"]
    assert length == (LENGTH + 4 if generate else LENGTH)
    assert data["offset"].dims == (*PREFILL, "offset")
    assert data["offset_position"].values[:-1].tolist() == list(range(length))
    assert np.isnan(data["offset_position"].values[-1])
    assert data["offset_special"].values.tolist() == [False] * length + [True]
    special = data["kind"].values[0] == KINDS.index("special")
    close(data["offset"].values, by_offset(data["attention"].values, special))


def test_offsets_of_patches() -> None:
    specimen = build("vit")
    data = forward(specimen, interp.Capture(attention=True, offset=True), specimen.inputs)["vision"]
    assert "offset_position" not in data.coords
    row, column = data["row_in_image"].values[0], data["column_in_image"].values[0]
    assert (row.max(), column.max()) == (5, 3)  # 48 x 32 pixels of patches of 8
    placed = row >= 0
    both = placed[:, None] & placed[None]
    p, got = data["attention"].values, data["offset"].values
    assert got.shape[-1] == 11 * 7 + 1
    for n in range(got.shape[-1] - 1):
        down, right = data["offset_row"].values[n], data["offset_column"].values[n]
        here = both & (row[:, None] - row == down) & (column[:, None] - column == right)
        close(got[..., n], (p * here).sum((-2, -1)))
    close(got[..., -1], (p * ~both).sum((-2, -1)))
    assert data["offset_special"].values.tolist() == [False] * 77 + [True]


@pytest.mark.parametrize("names", [None, ["start", "middle", "end"]])
def test_groups_of_the_user(names: list[str] | None, llama: Any) -> None:
    codes = [0, 0, 1, 1, 1, 2]  # positions after the last have its code
    data = forward(llama, interp.Capture(row_stats=True, attention=True, groups=codes, group_names=names))["text"]
    assert data["group"].values.tolist() == (names or ["0", "1", "2"])
    close(data["mass"].values, np.add.reduceat(data["attention"].values, [0, 2, 5], axis=-1))


def test_tokens_fed_and_produced(llama: Any) -> None:
    trace, out = generated(llama, interp.Capture(row_stats=True))
    data = trace["text"]
    for name in ("token_fed", "token_produced", "token_fed_id", "token_produced_id"):
        assert data[name].dims == ("sample", "query")
    # Rows of the prompt but its last produce no token of the answer.
    assert data["token_produced_id"].values[0].tolist() == [-1] * (LENGTH - 1) + out[0, LENGTH:].tolist()
    assert (data["token_produced"].values[0] == "").tolist() == [True] * (LENGTH - 1) + [False] * 5


def test_positions_in_a_padded_sample(llama: Any) -> None:
    data = forward(llama, interp.Capture(row_stats=True), llama.batch)["text"]
    pads = (llama.batch["attention_mask"] == 0).sum(1).tolist()
    assert pads == [0, 7]
    assert data["position_in_sample"].dims == ("sample", "query")
    count = data.sizes["query"]
    assert data["position_in_sample"].values.tolist() == [list(range(count)), [-1] * 7 + list(range(count - 7))]


def test_a_stack_is_checked_against_the_limit_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = recorder.estimate_bytes, []
    monkeypatch.setattr(recorder, "estimate_bytes", lambda *given: seen.append(given[1].name) or plain(*given))
    generated(llama, interp.Capture(row_stats=True))
    assert len(seen) == 1


@pytest.mark.parametrize("rows", ["all", [2, 3]], ids=str)
def test_a_known_log_sum_exp_is_handed_on_where_all_rows_are_read(
    rows: Any, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after a fused kernel on a GPU, which gives it for the whole call.
    seen: list[Any] = []
    plain_read, plain_attend = recorder.Recorder.read, recorder.attend
    known = torch.zeros(1, llama.module.config.num_attention_heads, LENGTH)
    monkeypatch.setattr(recorder.Recorder, "read", lambda self, *given: plain_read(self, *given[:3], known))  # type: ignore[call-arg]
    monkeypatch.setattr(recorder, "attend", lambda *q, lse, **given: seen.append(lse) or plain_attend(*q, **given))
    forward(llama, interp.Capture(row_stats=True, queries=rows, layers=[0]))
    assert len(seen) == 1
    assert seen[0] is (known if rows == "all" else None)


def test_a_call_marks_heads(llama: Any) -> None:
    marks = []

    class Mark(Intervention):
        def before(self, call: Any) -> None:
            marks.append(call.heads([1, 3]))

    with torch.no_grad(), interp.hooked(llama.module, interventions=[Mark()]):
        llama.module(llama.inputs["input_ids"])
    heads = llama.module.config.num_attention_heads
    for mark in marks:
        assert mark.tolist() == [[[h in (1, 3)] for h in range(heads)]]
    assert marks


def test_each_word_is_read_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Words:
        all_special_ids = ()

        def convert_ids_to_tokens(self, token: int) -> str:
            return f"piece {token}"

        def decode(self, tokens: list[int]) -> str:
            read.extend(tokens)
            return f"word {tokens[0]}"

    monkeypatch.setattr(llama.module, "tokenizer", Words(), raising=False)
    prompt = torch.tensor([[5, 6, 7, 6], [7, 8, 5, 9]])
    data = forward(llama, interp.Capture(row_stats=True), {"input_ids": prompt})["text"]
    assert data["token_fed"].values.tolist() == [[f"word {token}" for token in row] for row in prompt.tolist()]
    assert (data["token_produced"].values == "").all()
    assert sorted(read) == [5, 6, 7, 8, 9]
