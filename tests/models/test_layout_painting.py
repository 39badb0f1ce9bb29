"""Rows, columns and tiles checked by painting: change one patch of a picture and see which positions move.

The library's own processor cuts the picture and the model itself decides where it goes; the expected place follows from
the pixel that was painted. The tower's attention is silenced, so that nothing moves but what holds the painted patch.
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


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    # Thousands of runs of a tiny model: on a busy machine each would wait for its second thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
            if state is not None:  # Mllama gives its language model ids
                seen[where].append(state if state.ndim == 3 else state[None])

        return hook

    hooks = [
        attentions(module)[0].register_forward_pre_hook(
            keep("vision", "hidden_states", "hidden_state"), with_kwargs=True
        )
    ]
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


def patches(images: list[np.ndarray]) -> Iterator[tuple[list[np.ndarray], dict[int, tuple[int, int]]]]:
    """Pictures with one more patch of 8 pixels painted in each that has one left, and ``(y, x)`` of that patch by picture.

    What a patch moves belongs to its own picture, so one run tells of a patch of each.
    """
    of = [list(np.ndindex(image.shape[0] // 8, image.shape[1] // 8)) for image in images]
    for turn in range(max(map(len, of))):
        now = {n: (of[n][turn][0], of[n][turn][1]) for n in range(len(images)) if turn < len(of[n])}
        yield [painted(i, now[n][0] * 8, now[n][1] * 8, 8) if n in now else i for n, i in enumerate(images)], now


def by_image(
    found: Layout, where: list[tuple[int, int]], owner: list[tuple[int, int]], now: dict[int, Any]
) -> dict[int, list[tuple[int, int]]]:
    """Positions of each painted picture, which is all that may have moved."""
    split: dict[int, list[tuple[int, int]]] = {n: [] for n in now}
    for at in where:
        split[owner.index((int(found.prompt[at]), int(found.image[at])))].append(at)
    return split


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
    images = [picture(48, 80, 1), picture(48, 32, 2), picture(32, 64, 3)]
    owner = [(0, 0), (0, 1), (1, 0)]
    ids = typed(batch(prompt(15, 6), prompt(8, before=1)))

    def encode(images: list[np.ndarray]) -> dict[str, Any]:
        cut = processor(images=images, **PLAIN)
        return {**ids, "pixel_values": cut["pixel_values"], "image_grid_thw": cut["image_grid_thw"]}

    inputs = encode(images)
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 10], [1, 6, 4], [1, 4, 8]]
    found = layout(module, inputs)
    assert found["text"].notes == found["vision"].notes == ""
    assert found["text"].grid(image=1) == (3, 2)
    before = states(module, inputs)
    assert found["vision"].shape == tuple(before["vision"].shape[:2])
    for changed, now in patches(images):
        after = states(module, encode(changed))
        text = by_image(found["text"], moved(before["text"], after["text"]), owner, now)
        vision = by_image(found["vision"], moved(before["vision"], after["vision"]), owner, now)
        for n, (y, x) in now.items():
            assert places(found["text"], text[n]) == {(*owner[n], 0, y // 2, x // 2)}
            assert len(vision[n]) == 1
            assert places(found["vision"], vision[n]) == {(*owner[n], 0, y, x)}


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


# LLaVA-NeXT, LLaVA-OneVision: a thumbnail, and a canvas of tiles whose padding is cut off.

PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def anyres(name: str, **changes: Any) -> Any:
    import transformers

    stem = {"llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[name]
    vision = {**VISION, "image_size": 32, "patch_size": 8}
    if name == "llava_next":
        vision |= {"model_type": "clip_vision_model", "projection_dim": 16}
    else:
        vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}
        changes["video_token_index"] = VIDEO
    config = getattr(transformers, f"{stem}Config")(
        vision_config=vision,
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        **changes,
    )
    return tiny(getattr(transformers, f"{stem}ForConditionalGeneration"), config)


def anyres_processor(name: str) -> Any:
    import importlib

    stem = {"llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[name]
    source = importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    if name == "llava_onevision":
        size = {"size": {"height": 32, "width": 32}}
    return getattr(source, f"{stem}ImageProcessorPil")(image_grid_pinpoints=PINPOINTS, **size)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (64, 32)])
def test_anyres_tiles(name: str, shape: tuple[int, int]) -> None:
    module, processor = anyres(name), anyres_processor(name)
    rows, columns = shape[0] // 8, shape[1] // 8
    image, other = picture(*shape, seed=1), picture(32, 64, seed=2)
    ids = batch(prompt(16 + 4 * 9, before=2), prompt(16 + rows * (columns + 1)))

    def encode(image: np.ndarray) -> dict[str, Any]:
        cut = processor(images=[[other], [image]] if name == "llava_onevision" else [other, image], **PLAIN)
        return {**ids, "pixel_values": cut["pixel_values"], "image_sizes": cut["image_sizes"]}

    inputs = encode(image)
    found, before = layout(module, inputs), states(module, inputs)
    text, vision = found["text"], found["vision"]
    assert (text.notes, vision.notes) == ("", "")
    assert vision.shape == tuple(before["vision"].shape[:2])
    assert text.grid(tile=1, sample=1) == (rows, columns)
    assert (text.mask("special", image=0, tile=1).sum(axis=1) == [4, rows]).all()  # newlines
    canvas = [max(32, -(-side // 32) * 32) for side in shape]
    top, left = ((whole - side) // 2 for whole, side in zip(canvas, shape, strict=True))
    for y, x in np.ndindex(rows, columns):
        after = states(module, encode(painted(image, y * 8, x * 8, 8)))
        got = places(text, moved(before["text"], after["text"]))
        assert {place for place in got if place[2] == 1} == {(1, 0, 1, y, x)}
        (tile_row, inside_y), (tile_column, inside_x) = divmod(top + y * 8, 32), divmod(left + x * 8, 32)
        tile = 1 + tile_row * (canvas[1] // 32) + tile_column
        where = moved(before["vision"], after["vision"])
        sharp = [at for at in where if vision.tile[at] > 0]
        assert places(vision, sharp) == {(1, 0, tile, inside_y // 8, inside_x // 8)}
        assert {(int(vision.tile_row[at]), int(vision.tile_column[at])) for at in sharp} == {(tile_row, tile_column)}
        if name == "llava_onevision":  # LLaVA-NeXT's thumbnail is a crop of the middle here, not the whole picture
            small = (1, 0, 0, int((y + 0.5) * 4 / rows), int((x + 0.5) * 4 / columns))
            assert small in got
            assert small in places(vision, where)


def test_llava_onevision_shrinks_large_grids() -> None:
    module, processor = (
        anyres("llava_onevision", vision_aspect_ratio="anyres_max_1"),
        anyres_processor("llava_onevision"),
    )
    image = picture(64, 64)
    ids = batch(prompt(16 + 4 * 5))

    def encode(image: np.ndarray) -> dict[str, Any]:
        cut = processor(images=[image], **PLAIN)
        return {**ids, "pixel_values": cut["pixel_values"], "image_sizes": cut["image_sizes"]}

    found, before = layout(module, encode(image))["text"], states(module, encode(image))["text"]
    for y, x in np.ndindex(8, 8):
        after = states(module, encode(painted(image, y * 8, x * 8, 8)))["text"]
        got = places(found, moved(before, after))
        assert {place for place in got if place[2] == 1} == {(0, 0, 1, y // 2, x // 2)}


def test_llava_onevision_several_images_are_not_cut() -> None:
    module, processor = anyres("llava_onevision"), anyres_processor("llava_onevision")
    images = [picture(32, 32, seed) for seed in range(3)]
    ids = batch(prompt(17, 17), prompt(16 + 4 * 9, before=1))

    def encode(images: list[np.ndarray]) -> dict[str, Any]:
        cut = processor(images=[images[:2], [np.concatenate([images[2]] * 2, axis=1)]], **PLAIN)
        return {**ids, **{k: cut[k] for k in ("pixel_values", "image_sizes", "batch_num_images")}}

    inputs = encode(images)
    found, before = layout(module, inputs), states(module, inputs)
    for y, x in np.ndindex(4, 4):
        after = states(module, encode([images[0], painted(images[1], y * 8, x * 8, 8), images[2]]))
        assert places(found["text"], moved(before["text"], after["text"])) == {(0, 1, 0, y, x)}
        assert places(found["vision"], moved(before["vision"], after["vision"])) == {(0, 1, 0, y, x)}


def test_llava_onevision_video_frames_are_tiles() -> None:
    module = anyres("llava_onevision")
    video = torch.rand(1, 2, 3, 32, 32)
    ids = batch(prompt([*[VIDEO] * (2 * 4 + 1)]))
    inputs = {**ids, "pixel_values_videos": video}
    found, before = layout(module, inputs), states(module, inputs)
    for f, y, x in np.ndindex(2, 4, 4):
        changed = video.clone()
        changed[0, f, :, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8] += 3.0
        after = states(module, {**ids, "pixel_values_videos": changed})
        assert places(found["text"], moved(before["text"], after["text"])) == {(0, 0, f, y // 2, x // 2)}
        assert places(found["vision"], moved(before["vision"], after["vision"])) == {(0, 0, f, y, x)}


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_anyres_counts_equal_the_librarys_for_any_size(name: str) -> None:
    module = anyres(name)
    module.config.image_grid_pinpoints = [[32 * r, 32 * c] for r in range(1, 7) for c in range(1, 7)]
    draw = np.random.default_rng(0)
    for size in draw.integers(9, 900, (40, 2)).tolist():
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution(size, module.config.image_grid_pinpoints)
        features = torch.zeros(1 + height * width // 32**2, 16, 48)
        sizes = torch.tensor([size])
        more = {"vision_feature_select_strategy": "full"} if name == "llava_next" else {}
        _, lengths = module.model.pack_image_features([features], sizes, image_newline=torch.zeros(48), **more)
        inputs = {**batch(prompt(int(lengths[0]))), "image_sizes": sizes}
        assert layout(module, inputs)["text"].mask("image", image=0, tile=0).sum() == 16


# Idefics3, SmolVLM: tiles in rows with markers, the whole image last.


def idefics(name: str) -> Any:
    import transformers

    stem = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[name]
    config = getattr(transformers, f"{stem}Config")(
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **TEXT},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return tiny(getattr(transformers, f"{stem}ForConditionalGeneration"), config)


def tiled(rows: int, columns: int, newline: list[int]) -> list[int]:
    """The processor's text for one image, `<row_r_col_c>` as MARK + running number."""
    ids: list[int] = []
    for row in range(rows):
        for column in range(columns):
            ids += [FAKE, MARK + row * 3 + column, *[IMAGE] * 4]
        ids += newline
    return [*ids, *(newline if rows else []), FAKE, MARK + 9, *[IMAGE] * 4, FAKE]


@pytest.mark.parametrize("newline", [[60], [61, 62]])
@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_idefics_tiles(name: str, newline: list[int]) -> None:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 96}, max_image_size={"longest_edge": 32}, return_row_col_info=True
    )
    module = idefics(name)
    images = [picture(64, 96, 1), picture(32, 96, 2), picture(96, 64, 3)]
    owner, grids = [(0, 0), (0, 1), (1, 0)], [(2, 3), (1, 3), (3, 2)]

    def encode(images: list[np.ndarray]) -> dict[str, Any]:
        cut = processor(images=[images[:2], images[2:]], **PLAIN)
        assert [list(r) for r in cut["rows"]] == [[2, 1], [3]]
        texts = [tiled(*grid, newline) for grid in grids]
        # The first image is followed by the second at once: their markers touch.
        ids = batch(prompt([*texts[0], *texts[1]]), prompt(texts[2], before=1))
        return {**ids, "pixel_values": cut["pixel_values"], "pixel_attention_mask": cut["pixel_attention_mask"]}

    inputs = encode(images)
    found, before = layout(module, inputs), states(module, inputs)
    text, vision = found["text"], found["vision"]
    assert (text.notes, vision.notes) == ("", "")
    assert vision.shape == tuple(before["vision"].shape[:2])
    ids = inputs["input_ids"].numpy()
    assert (text.kind[(ids == FAKE) | ((ids >= MARK) & (ids < MARK + 10))] == 0).all()
    for changed, now in patches(images):
        after = states(module, encode(changed))
        moved_text = by_image(text, moved(before["text"], after["text"]), owner, now)
        moved_vision = by_image(vision, moved(before["vision"], after["vision"]), owner, now)
        for n, (y, x) in now.items():
            tile = (y // 4) * grids[n][1] + x // 4
            whole = grids[n][0] * grids[n][1]
            where = moved_text[n]
            sharp = [at for at in where if text.tile[at] != whole]
            assert places(text, sharp) == {(*owner[n], tile, y % 4 // 2, x % 4 // 2)}
            assert {(int(text.tile_row[at]), int(text.tile_column[at])) for at in sharp} == {(y // 4, x // 4)}
            blurred = [at for at in where if text.tile[at] == whole]
            small = (int((y + 0.5) * 2 / (4 * grids[n][0])), int((x + 0.5) * 2 / (4 * grids[n][1])))
            assert (*owner[n], whole, *small) in places(text, blurred)
            assert all(text.tile_row[at] == -1 for at in blurred)
            sharp = [at for at in moved_vision[n] if vision.tile[at] != whole]
            assert places(vision, sharp) == {(*owner[n], tile, y % 4, x % 4)}


def test_idefics_masked_patches_are_pads() -> None:
    module = idefics("idefics3")
    mask = torch.ones(1, 1, 32, 32, dtype=torch.long)
    mask[..., 16:, :] = 0
    inputs = {
        **batch(prompt(tiled(0, 0, []))),
        "pixel_values": torch.rand(1, 1, 3, 32, 32),
        "pixel_attention_mask": mask,
    }
    found = layout(module, inputs)["vision"]
    assert (found.kind[0].reshape(4, 4) == [[2] * 4] * 2 + [[-1] * 4] * 2).all()
    assert np.isnan(found.overlay(np.ones(16))).sum() == 0 and found.grid() == (2, 4)


# InternVL: tiles, then the thumbnail.


def test_internvl_tiles() -> None:
    from transformers import InternVLConfig, InternVLForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    config = InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    module = tiny(InternVLForConditionalGeneration, config)
    processor = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    images = [picture(64, 96, 1), picture(32, 32, 2), picture(32, 96, 3)]
    owner, grids = [(0, 0), (0, 1), (1, 0)], [(2, 3), (1, 1), (1, 3)]
    ids = batch(prompt(7 * 4, 4), prompt(4 * 4, before=1))

    def encode(images: list[np.ndarray]) -> dict[str, Any]:
        return {**ids, "pixel_values": processor(images=images, **PLAIN)["pixel_values"]}

    inputs = encode(images)
    found, before = layout(module, inputs), states(module, inputs)
    assert "thumbnail last" in found["text"].notes
    assert found["vision"].notes == ""
    assert found["vision"].mask("special").sum(axis=1).tolist() == [1] * len(inputs["pixel_values"])
    for changed, now in patches(images):
        after = states(module, encode(changed))
        split = {s: by_image(found[s], moved(before[s], after[s]), owner, now) for s in ("text", "vision")}
        for n, (y, x) in now.items():
            tile, thumbnail = (y // 4) * grids[n][1] + x // 4, grids[n][0] * grids[n][1]
            for stack, merge in (("text", 2), ("vision", 1)):
                where = [at for at in split[stack][n] if found[stack].tile[at] != thumbnail]
                assert places(found[stack], where) == {(*owner[n], tile, y % 4 // merge, x % 4 // merge)}


# Mllama: tiles in the keys of the cross attention.


def test_mllama_tiles_are_keys_of_the_cross_attention() -> None:
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    config = MllamaConfig(
        vision_config={
            **{k: v for k, v in VISION.items() if k != "num_attention_heads"},
            "attention_heads": 4,
            "num_global_layers": 1,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
        text_config={**TEXT, "num_hidden_layers": 2, "cross_attention_layers": [1], "rope_parameters": None},
        image_token_index=IMAGE,
    )
    module = tiny(MllamaForConditionalGeneration, config)
    processor = MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=4)
    images, grids = [picture(32, 64, 1), picture(64, 64, 2), picture(96, 32, 3)], [(1, 2), (2, 2), (3, 1)]
    owner = [(0, 0), (0, 1), (1, 0)]
    ids = batch([1, IMAGE, IMAGE, 20, 21, 22], [1, IMAGE, 20, 21])
    seen: list[Tensor] = []
    module.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["cross_attention_states"].reshape(2, -1, 64)), with_kwargs=True
    )

    def run(images: list[np.ndarray]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        cut = processor(images=[images[:2], images[2:]], **PLAIN)
        inputs = {**ids, **{k: cut[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}}
        got = states(module, inputs)
        return inputs, {"vision": got["vision"], "cross": seen.pop()}

    inputs, before = run(images)
    found = layout(module, inputs)
    assert not found["text"].mask("image").any()
    assert found["text"].mask("special")[0].tolist() == [False, True, True, False, False, False]
    for stack in ("vision", "cross"):
        assert found[stack].shape == tuple(before[stack].shape[:2])
        assert found[stack].notes == ""
    for changed, now in patches(images):
        _, after = run(changed)
        split = {s: by_image(found[s], moved(before[s], after[s]), owner, now) for s in ("vision", "cross")}
        for n, (y, x) in now.items():
            tile = (y // 4) * grids[n][1] + x // 4
            for stack in ("vision", "cross"):
                where = split[stack][n]
                assert places(found[stack], where) == {(*owner[n], tile, y % 4, x % 4)}
                at = where[0]
                assert (found[stack].tile_row[at], found[stack].tile_column[at]) == (y // 4, x // 4)


# LLaVA with other towers and other feature selection.


@pytest.mark.parametrize(("tower_type", "strategy"), [("clip", "full"), ("siglip", "default"), ("siglip", "full")])
def test_llava_feature_selection(tower_type: str, strategy: str) -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {**VISION, "model_type": f"{tower_type}_vision_model", "image_size": 32, "patch_size": 8}
    vision |= {"vision_use_head": False} if tower_type == "siglip" else {"projection_dim": 16}
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        vision_feature_select_strategy=strategy,
    )
    module = tiny(LlavaForConditionalGeneration, config)
    specials = int(tower_type == "clip")
    count = 16 + specials - int(strategy == "default")
    pixels = torch.rand(1, 3, 32, 32)
    inputs = {**batch(prompt(count)), "pixel_values": pixels}
    found, before = layout(module, inputs)["text"], states(module, inputs)["text"]
    assert found.mask("special", image=0).sum() == (specials if strategy == "full" else 0)
    for y, x in np.ndindex(4, 4):
        changed = pixels.clone()
        changed[..., y * 8 : y * 8 + 8, x * 8 : x * 8 + 8] += 3.0
        where = moved(before, states(module, {**inputs, "pixel_values": changed})["text"])
        dropped = strategy == "default" and tower_type == "siglip" and (y, x) == (0, 0)
        assert places(found, where) == (set() if dropped else {(0, 0, 0, y, x)})


def test_pixtral_images_of_any_shape() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {**VISION, "model_type": "pixtral", "image_size": 64, "patch_size": 8, "head_dim": 8}
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    module = tiny(LlavaForConditionalGeneration, config)
    sizes, owner = [(32, 48), (16, 24), (40, 16)], [(0, 0), (0, 1), (1, 0)]
    rows = [[t for _ in range(h // 8) for t in [*[IMAGE] * (w // 8), START]] for h, w in sizes]
    ids = batch(prompt(rows[0], rows[1]), prompt(rows[2], before=1))
    pixels = torch.rand(3, 3, 40, 48)
    inputs = {**ids, "pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    found, before = layout(module, inputs), states(module, inputs)
    assert found["vision"].shape == tuple(before["vision"].shape[:2])
    for n, (h, w) in enumerate(sizes):
        for y, x in np.ndindex(h // 8, w // 8):
            changed = pixels.clone()
            changed[n, :, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8] += 3.0
            after = states(module, {**inputs, "pixel_values": changed})
            for stack in ("text", "vision"):
                assert places(found[stack], moved(before[stack], after[stack])) == {(*owner[n], 0, y, x)}
