"""Kinds, pads, helpers and errors of layouts; rows and columns are checked by painting in test_layout_painting."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from interp.models.layout import KINDS, Layout, LayoutError, layout, text_cells
from interp.models.layout_cells import FIELDS
from interp.testing import build, families

SPECIAL, TEXT, IMAGE, GENERATED, AUDIO = range(5)


class Words:
    """A tokenizer of a few words, one of which is part of a character."""

    all_special_ids = (1, 2)

    @property
    def added_tokens_decoder(self) -> dict[int, SimpleNamespace]:
        return {7: SimpleNamespace(special=True), 8: SimpleNamespace(special=False)}

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return {20: "▁the", 21: "Ġcat", 22: "<0xE2>"}.get(token, f"w{token}")

    def decode(self, ids: list[int]) -> str:
        return {20: "the", 21: " cat", 22: "�"}.get(ids[0], f"w{ids[0]}")


def llama(ids: list[list[int]], mask: list[list[int]] | None = None, **more: Any) -> Layout:
    inputs = {"input_ids": torch.tensor(ids)}
    if mask is not None:
        inputs["attention_mask"] = torch.tensor(mask)
    return layout(build("llama").module, inputs, **more)["text"]


def test_text_kinds_without_a_tokenizer_come_from_the_config() -> None:
    found = llama([[1, 30, 31, 2], [0, 0, 1, 33]], [[1, 1, 1, 1], [0, 0, 1, 1]])
    assert found.kind.tolist() == [[SPECIAL, TEXT, TEXT, SPECIAL], [-1, -1, SPECIAL, TEXT]]
    assert found.kind.dtype == np.int8
    assert found.tokens[0].tolist() == ["1", "30", "31", "2"]
    assert found.token_ids.tolist()[1] == [0, 0, 1, 33]
    assert found.groups().tolist() == [[0, 1, 1, 0], [0, 0, 0, 1]]
    assert found.groups().dtype == np.int8
    assert found.prompt[:, 0].tolist() == [0, 1]
    assert (found.row == -1).all() and (found.image == -1).all()


def test_a_pad_token_that_is_attended_is_special_not_a_pad() -> None:
    assert llama([[0, 30]]).kind.tolist() == [[SPECIAL, TEXT]]


def test_special_and_readable_tokens_come_from_the_tokenizer() -> None:
    found = llama([[1, 7, 8, 20, 21, 22]], tokenizer=Words())
    assert found.kind.tolist() == [[SPECIAL, SPECIAL, TEXT, TEXT, TEXT, TEXT]]
    assert found.tokens[0].tolist() == ["w1", "w7", "w8", " the", " cat", "<0xE2>"]


@pytest.mark.real("stories260k")
def test_readable_tokens_of_a_real_tokenizer(shared: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("Once upon a time, Lily's café", return_tensors="pt")
    found = layout(AutoModelForCausalLM.from_pretrained(folder), inputs, tokenizer)["text"]
    assert found.tokens[0, :5].tolist() == ["<s>", " Once", " upon", " a", " time"]
    assert "".join(found.tokens[0, 1:]) == " Once upon a time, Lily's café"
    assert found.kind[0].tolist() == [SPECIAL, *[TEXT] * (found.shape[1] - 1)]


def test_generated_positions() -> None:
    found = llama([[1, 30, 31, 2]], generated=2)
    assert found.kind.tolist() == [[SPECIAL, TEXT, GENERATED, GENERATED]]
    with pytest.raises(LayoutError, match="generated must lie between 0 and the 4 positions"):
        llama([[1, 30, 31, 2]], generated=5)


def test_extend_appends_generated_tokens() -> None:
    start = llama([[1, 30], [1, 31]])
    found = start.extend(torch.tensor([[20, 2], [21, 0]]), Words(), pads=np.array([[False, False], [False, True]]))
    assert found.kind.tolist() == [[SPECIAL, TEXT, GENERATED, GENERATED], [SPECIAL, TEXT, GENERATED, -1]]
    assert found.token_ids[:, 2].tolist() == [20, 21]
    assert found.tokens[:, 2].tolist() == [" the", " cat"]
    assert found.prompt.tolist() == [[0] * 4, [1] * 4]
    assert start.shape == (2, 2)
    assert llama([[1, 30]]).extend([20, 21]).shape == (1, 4)
    with pytest.raises(LayoutError, match=r"ids must be \[sample, n\] with 2 samples, got shape \(1, 3\)"):
        start.extend([1, 2, 3])


def test_overlay_puts_values_on_the_patch_grid() -> None:
    specimen = build("qwen2_5_vl")
    found = layout(specimen.module, specimen.inputs)["vision"]
    values = 100 * found.row + found.column
    grid = found.overlay(np.stack([values[0], -values[0]]), image=1)
    assert grid.shape == (2, *found.grid(image=1)) == (2, 4, 6)
    assert (grid[0] == 100 * np.arange(4)[:, None] + np.arange(6)).all()
    assert (grid[1] == -grid[0]).all()
    # The tower's own order is another one.
    assert (np.diff(values[0, : 6 * 8]) < 0).sum() > 6
    with pytest.raises(LayoutError, match=r"values must be \[..., 72 positions\], got shape \(5,\)"):
        found.overlay(np.ones(5), image=1)
    with pytest.raises(
        LayoutError, match=r"image, tile must name patches .* got \(4, 0\); tiles there: \[\(0, 0\), \(1"
    ):
        found.grid(image=4)


def test_mask_selects_kind_image_and_tile() -> None:
    specimen = build("gemma3")
    found = layout(specimen.module, specimen.inputs)["text"]
    ids = specimen.inputs["input_ids"].numpy()
    assert (found.mask("image") == (ids == 5)).all()
    assert found.mask("special")[ids == 6].all() and found.mask("special")[ids == 7].all()
    first, second = found.mask("image", image=0), found.mask("image", image=1)
    assert first.sum() == second.sum() == 4 and not (first & second).any()
    assert np.flatnonzero(first[0]).max() < np.flatnonzero(second[0]).min()
    assert not found.mask("image", image=0, tile=1).any()
    with pytest.raises(LayoutError, match=r"kind must be one of .* got 'picture'"):
        found.mask("picture")


def test_encoder_decoder_stacks() -> None:
    specimen = build("t5")
    found = layout(specimen.module, specimen.batch or {})
    assert set(found) == {"encoder", "text", "cross"}
    pads = (specimen.batch or {})["attention_mask"].numpy() == 0
    assert pads.any()
    assert ((found["encoder"].kind == -1) == pads).all()
    assert (found["cross"].kind == found["encoder"].kind).all() and found["cross"].stack == "cross"
    assert found["text"].shape == tuple((specimen.batch or {})["decoder_input_ids"].shape)
    inputs = {k: v for k, v in specimen.inputs.items() if k != "decoder_input_ids"}
    start = layout(specimen.module, inputs)["text"]
    assert start.shape == (1, 1) and "generate starts from" in start.notes


def test_whisper_frames_are_audio() -> None:
    specimen = build("whisper")
    found = layout(specimen.module, specimen.inputs)
    with torch.no_grad():
        frames = specimen.module(**specimen.inputs).encoder_last_hidden_state
    assert found["audio"].shape == tuple(frames.shape[:2])
    assert (found["audio"].kind == KINDS.index("audio")).all()
    assert (found["cross"].groups() == AUDIO).all()


def test_blip2_queries_have_no_rows() -> None:
    specimen = build("blip2")
    found = layout(specimen.module, specimen.inputs)
    assert found["qformer"].mask("image").all()
    assert (found["text"].row == -1).all() and found["text"].mask("image", image=0).any()
    assert found["qformer_cross"].shape == found["vision"].shape
    with pytest.raises(LayoutError, match="rows and columns"):
        found["text"].grid()


@pytest.mark.parametrize("name", families(reached=True))
@pytest.mark.parametrize("which", ["inputs", "batch"])
def test_layouts_have_the_lengths_of_the_run(name: str, which: str) -> None:
    """Query and key lengths of every site's calls, from the shapes the model itself uses."""
    from transformers import AttentionInterface

    from interp.testing.specimen import configs

    specimen = build(name)
    inputs = getattr(specimen, which)
    if inputs is None:
        pytest.skip(f"{name} has no batch")
    found = layout(specimen.module, inputs)
    cells = text_cells(specimen.module, inputs)
    assert (cells is None) == ("text" not in found)
    for field in () if cells is None else FIELDS:
        assert (cells[field] == getattr(found["text"], field)).all(), field
    path_of = {module: path for path, module in specimen.module.named_modules()}
    calls: dict[str, list[tuple[int, int]]] = {}

    def lengths(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        calls.setdefault(path_of[module], []).append((key.shape[0], key.shape[2]))
        batch, heads, rows, _ = query.shape
        return query.new_zeros(batch, rows, heads, value.shape[-1]), None

    AttentionInterface.register("lengths", lengths)
    for config in configs(specimen.module):
        config._attn_implementation_internal = "lengths"
    with torch.no_grad():
        specimen.module(**inputs)
    for stack, sites in specimen.stacks.items():
        one = found[stack if stack in found else stack.partition("_")[0]]
        for site in sites.sites:
            if site is None:
                continue
            samples, keys = calls[site][0]
            if name.startswith("qwen") and stack == "vision":
                samples, keys = 1, sum(keys for _, keys in calls[site])
            assert one.shape == (samples, keys), (stack, site)


def test_an_unknown_family_says_what_it_assumes() -> None:
    specimen = build("llava")
    specimen.module.config.__class__ = type("Other", (type(specimen.module.config),), {"model_type": "other"})
    found = layout(specimen.module, specimen.inputs)["text"]
    assert found.grid() == (4, 4)
    assert "other lays out image tokens is not known: 4 x 4" in found.notes
    ids = specimen.inputs["input_ids"].clone()
    ids[0, -2:] = 5
    odd = layout(specimen.module, {**specimen.inputs, "input_ids": ids})["text"]
    assert (odd.row == -1).all() and "they have no rows" in odd.notes


def test_idefics_without_markers_says_so() -> None:
    specimen = build("idefics3")
    found = layout(specimen.module, specimen.inputs)["text"]
    assert "No tile markers" in found.notes
    assert found.grid(image=1) == (3, 3)


def test_a_hierarchical_tower_has_no_layout() -> None:
    specimen = build("swinv2")
    assert layout(specimen.module, specimen.inputs) == {}


def test_errors_name_the_argument() -> None:
    llava, anyres = build("llava"), build("llava_onevision")
    with pytest.raises(LayoutError, match=r"inputs must hold one of .*'input_ids'.*got"):
        layout(llava.module, {"attention_mask": torch.ones(1, 3)})
    with pytest.raises(LayoutError, match="inputs_embeds does not tell"):
        layout(llava.module, {"inputs_embeds": torch.ones(1, 3, 48), "pixel_values": torch.ones(1, 3, 32, 32)})
    with pytest.raises(LayoutError, match=r"input_ids must hold as many image tokens .*together 0\), got 3"):
        layout(llava.module, {"input_ids": torch.tensor([[1, 5, 5, 5]])})
    with pytest.raises(LayoutError, match="inputs must hold image_sizes"):
        layout(anyres.module, {k: v for k, v in anyres.inputs.items() if k != "image_sizes"})
    with pytest.raises(LayoutError, match=r"input_ids must be \[sample, position\], got shape \(3,\)"):
        layout(llava.module, {"input_ids": torch.tensor([1, 2, 3])})
    with pytest.raises(LayoutError, match="attention_mask must have the shape of input_ids"):
        layout(llava.module, {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 4)})
    split = torch.full((2, 8), 5)
    with pytest.raises(LayoutError, match="16 tokens of an image in one sample"):
        layout(llava.module, {"input_ids": split})
