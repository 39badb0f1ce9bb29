"""Rows, columns and tiles checked by painting: change one patch of a picture and see which positions move.

The library's own processor cuts the picture and the model itself decides where it goes; the expected place follows from the
pixel that was painted. The tower's attention is silenced, so that nothing but the positions that hold the painted patch moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from interp.models.layout import Layout, layout
from interp.testing import build
from interp.testing.weights import randomise

IMAGE, START, END, VIDEO, FAKE, MARK = 5, 6, 7, 8, 9, 10
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
PLAIN: dict[str, Any] = {"do_normalize": False, "do_rescale": True, "do_convert_rgb": False, "return_tensors": "pt"}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random pixels ``[height, width, 3]``, dark so that paint is bright everywhere."""
    return np.random.default_rng(seed).integers(20, 90, (height, width, 3)).astype(np.uint8)


def painted(image: np.ndarray, y: int, x: int, size: int) -> np.ndarray:
    image = image.copy()
    image[y : y + size, x : x + size] += 120
    return image


def tower(module: nn.Module) -> nn.Module:
    own: Any = getattr(module, "model", module)
    names = ("vision_tower", "vision_model", "visual")
    return next((getattr(own, n) for n in names if isinstance(getattr(own, n, None), nn.Module)), module)


def attentions(module: nn.Module) -> list[nn.Module]:
    return [m for m in tower(module).modules() if type(m).__name__.endswith("Attention")]


@contextmanager
def silent(module: nn.Module) -> Iterator[None]:
    """Attention of the vision tower writes nothing, so that patches do not mix."""

    def nothing(_: nn.Module, __: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    handles = [m.register_forward_hook(nothing) for m in attentions(module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def states(module: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What enters the language model, and what enters the first attention of the tower: ``[sample, position, dim]``."""
    seen: dict[str, list[Tensor]] = {"text": [], "vision": []}

    def keep(where: str, *names: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            state = next((kwargs[n] for n in names if kwargs.get(n) is not None), args[0] if args else None)
            assert state is not None
            seen[where].append(state if state.ndim == 3 else state[None])

        return hook

    hooks = [attentions(module)[0].register_forward_pre_hook(keep("vision", "hidden_states"), with_kwargs=True)]
    own = getattr(module, "model", None)
    language = getattr(own, "language_model", getattr(own, "text_model", None))
    if language is not None:
        hooks.append(language.register_forward_pre_hook(keep("text", "inputs_embeds"), with_kwargs=True))
    with silent(module), torch.no_grad():
        module(**inputs)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts, dim=0) for name, parts in seen.items() if parts}


def moved(before: Tensor, after: Tensor) -> list[tuple[int, int]]:
    """``(sample, position)`` of the positions that changed."""
    assert before.shape == after.shape
    return [(int(s), int(p)) for s, p in ((after - before).abs().amax(-1) > 1e-6).nonzero()]


def places(found: Layout, where: list[tuple[int, int]]) -> set[tuple[int, ...]]:
    """``(prompt, image, tile, row, column)`` of positions, all of which must be patches."""
    fields = (found.prompt, found.image, found.tile, found.row, found.column)
    assert all(found.mask("image")[at] for at in where)
    return {tuple(int(field[at]) for field in fields) for at in where}


def prompt(*images: int | list[int], before: int = 3, after: int = 4) -> list[int]:
    """Ids: text, then each image between its markers (a list stands as it is), then text."""
    ids = [1, *range(20, 20 + before)]
    for image in images:
        ids += image if isinstance(image, list) else [START, *[IMAGE] * image, END]
        ids += [30, 31]
    return [*ids, *range(40, 40 + after)]


def batch(*prompts: list[int]) -> dict[str, Tensor]:
    """Left padded."""
    longest = max(len(ids) for ids in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def typed(ids: dict[str, Tensor]) -> dict[str, Tensor]:
    kinds = (ids["input_ids"] == IMAGE).long() + 2 * (ids["input_ids"] == VIDEO).long()
    return {**ids, "mm_token_type_ids": kinds}


def tiny(model: Any, config: Any) -> Any:
    torch.manual_seed(0)
    module = model(config)
    randomise(module, seed=0, gain=1.0)
    return module.eval()


# Vision towers: every patch of every grid.


@pytest.mark.parametrize(
    "name", ["vit", "deit", "dinov2", "dinov2_registers", "dinov3", "clip", "siglip", "llava", "paligemma", "gemma3"]
)
def test_every_patch_of_a_tower_has_its_row_and_column(name: str) -> None:
    specimen = build(name)
    module, inputs = specimen.module, dict(specimen.inputs)
    found = layout(module, inputs)["vision"]
    before = states(module, inputs)["vision"]
    assert found.shape == tuple(before.shape[:2])
    assert found.notes == ""
    size = 8
    rows, columns = (n // size for n in inputs["pixel_values"].shape[-2:])
    assert found.grid() == (rows, columns)
    for row, column in np.ndindex(rows, columns):
        pixels = inputs["pixel_values"].clone()
        pixels[-1, :, row * size : (row + 1) * size, column * size : (column + 1) * size] += 3.0
        after = states(module, {**inputs, "pixel_values": pixels})["vision"]
        where = moved(before, after)
        assert len(where) == 1
        assert {place[2:] for place in places(found, where)} == {(0, row, column)}
        assert where[0][0] == len(pixels) - 1


def test_special_tokens_of_towers_lead() -> None:
    leading = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2_registers": 4, "dinov3": 4, "clip": 1, "siglip": 0, "llava": 1}
    for name, count in leading.items():
        specimen = build(name)
        found = layout(specimen.module, specimen.inputs)["vision"]
        assert found.mask("special")[0].nonzero()[0].tolist() == list(range(count)), name


# Image tokens of one picture, one tile.


@pytest.mark.parametrize(("name", "step"), [("llava", 8), ("paligemma", 8), ("gemma3", 16)])
def test_every_patch_of_a_square_image_reaches_its_token(name: str, step: int) -> None:
    specimen = build(name)
    module, inputs = specimen.module, dict(specimen.batch or {})
    found = layout(module, inputs)["text"]
    before = states(module, inputs)["text"]
    side = 32 // step
    assert found.grid(sample=1) == (side, side)
    for row, column in np.ndindex(side, side):
        pixels = inputs["pixel_values"].clone()
        pixels[1, :, row * step : (row + 1) * step, column * step : (column + 1) * step] += 3.0
        after = states(module, {**inputs, "pixel_values": pixels})["text"]
        assert places(found, moved(before, after)) == {(1, 0, 0, row, column)}


# Qwen-VL: merge blocks and windows, two images in one prompt and one in another.


def qwen(name: str) -> Any:
    import transformers

    stem = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[name]
    vision: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "intermediate_size": 48}
    if name == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2}
    if name == "qwen2_5_vl":
        vision |= {"window_size": 32, "fullatt_block_indexes": [1], "out_hidden_size": 64}
    if name == "qwen3_vl":
        vision |= {"out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    config = getattr(transformers, f"{stem}Config")(
        vision_config={**vision, "spatial_merge_size": 2},
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return tiny(getattr(transformers, f"{stem}ForConditionalGeneration"), config)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_patches_merge_and_windows(name: str) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 256, "longest_edge": 10**6}
    )
    module = qwen(name)
    images = [picture(80, 112, 1), picture(48, 32, 2), picture(64, 96, 3)]
    owner = [(0, 0), (0, 1), (1, 0)]
    ids = typed(batch(prompt(35, 6), prompt(24, before=1)))

    def encode(images: list[np.ndarray]) -> dict[str, Any]:
        cut = processor(images=images, **PLAIN)
        return {**ids, "pixel_values": cut["pixel_values"], "image_grid_thw": cut["image_grid_thw"]}

    inputs = encode(images)
    assert inputs["image_grid_thw"].tolist() == [[1, 10, 14], [1, 6, 4], [1, 8, 12]]
    found = layout(module, inputs)
    assert found["text"].notes == found["vision"].notes == ""
    assert found["text"].grid(image=1) == (3, 2)
    before = states(module, inputs)
    assert found["vision"].shape == tuple(before["vision"].shape[:2])
    for n, image in enumerate(images):
        for y, x in np.ndindex(image.shape[0] // 8, image.shape[1] // 8):
            changed = [painted(i, y * 8, x * 8, 8) if i is image else i for i in images]
            after = states(module, encode(changed))
            assert places(found["text"], moved(before["text"], after["text"])) == {(*owner[n], 0, y // 2, x // 2)}
            where = moved(before["vision"], after["vision"])
            assert len(where) == 1
            assert places(found["vision"], where) == {(*owner[n], 0, y, x)}


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_video_frames_are_tiles(name: str) -> None:
    """Patch rows of a video are laid out here as the processor does: frame, block row, block column, row, column."""
    module = qwen(name)
    t, h, w = 3, 4, 6
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(t, h, w, 3 * 2 * 8 * 8, generator=generator)

    def encode(video: Tensor) -> dict[str, Any]:
        blocks = video.reshape(t, h // 2, 2, w // 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
        frame = [START, *[VIDEO] * 6, END]
        # Qwen3-VL writes a time stamp before each frame; the others keep the frames together.
        marked = [*frame, 50, *frame, 51, *frame] if name == "qwen3_vl" else [START, *[VIDEO] * 18, END]
        return {
            **typed(batch(prompt(marked))),
            "pixel_values_videos": blocks.reshape(t * h * w, -1),
            "video_grid_thw": torch.tensor([[t, h, w]]),
        }

    inputs = encode(video)
    found, before = layout(module, inputs), states(module, inputs)
    for f, r, c in np.ndindex(t, h, w):
        changed = video.clone()
        changed[f, r, c] += 3.0
        after = states(module, encode(changed))
        assert places(found["text"], moved(before["text"], after["text"])) == {(0, 0, f, r // 2, c // 2)}
        assert places(found["vision"], moved(before["vision"], after["vision"])) == {(0, 0, f, r, c)}
