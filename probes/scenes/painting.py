"""Pictures of scenes: the same pixels for one scene or thousands at once, on a CPU or a GPU (:func:`draw`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from probes.samples import ProbeError
from probes.scenes.catalog import INDEX, MATS, NAMES, SETTINGS
from probes.scenes.world import MOST, SIZE, Scene

HERE = Path(__file__).resolve()
ATLASES = (HERE.parents[1] / "_scenes" / "sprites.png", HERE.parents[2] / "data" / "scenes" / "sprites.png")
"""Where the pictograms lie: in an installed wheel, and in a checkout."""
EDGE = 48
COLUMNS = 13
# An object's columns in `pack`.
SPRITE, X, Y, WIDE, CONTRAST, HIDDEN, SIDE, TILT, MIRRORED, MAT = range(10)
MAT_SIZE = 0.62
FOG = (0.78, 0.80, 0.82)


@functools.cache
def atlas(device: str = "cpu") -> Tensor:
    """All pictograms, fp32 ``[object, RGBA, 48, 48]`` in [0, 1], colours premultiplied by opacity.

    Raises:
        ProbeError: the file is missing or of another size.
    """
    path = next((p for p in ATLASES if p.is_file()), None)
    if path is None:
        raise ProbeError(f"the scenes' pictograms must lie at {ATLASES[-1]}; make them with data/build/sprites.py")
    pixels = np.asarray(Image.open(path).convert("RGBA"), dtype=np.float32) / 255
    rows = -(-len(NAMES) // COLUMNS)
    if pixels.shape != (rows * EDGE, COLUMNS * EDGE, 4):
        raise ProbeError(f"{path} must be {COLUMNS * EDGE} x {rows * EDGE} pixels, got {pixels.shape[1::-1]}")
    tiles = pixels.reshape(rows, EDGE, COLUMNS, EDGE, 4).transpose(0, 2, 4, 1, 3).reshape(-1, 4, EDGE, EDGE)
    sheet = torch.from_numpy(np.ascontiguousarray(tiles[: len(NAMES)]))
    sheet[:, :3] *= sheet[:, 3:]
    return sheet.to(device)


def pack(scenes: Sequence[Scene]) -> dict[str, NDArray[Any]]:
    """The numbers a drawing needs: ``objects [scene, 6, 10]`` (sprite -1 is none), ``air [scene, 4]``, ``paint [scene]``."""
    objects = np.zeros((len(scenes), MOST, 10), dtype=np.float32)
    objects[:, :, SPRITE] = -1
    air = np.zeros((len(scenes), 4), dtype=np.float32)
    colours = list(MATS)
    settings = {setting.name: number for number, setting in enumerate(SETTINGS)}
    for n, scene in enumerate(scenes):
        if len(scene.objects) > MOST:
            raise ProbeError(f"a scene must have at most {MOST} objects, got {len(scene.objects)} in {scene.id}")
        for k, t in enumerate(scene.objects):
            mat = -1 if t.mat is None else colours.index(t.mat)
            objects[n, k] = (
                INDEX[t.name], *t.centre, t.size, t.contrast, t.hidden, t.side, t.tilt, t.mirrored, mat,
            )  # fmt: skip
        air[n] = scene.clarity, scene.bright, settings[scene.setting], 0
    return {"objects": objects, "air": air, "paint": np.array([s.paint for s in scenes], dtype=np.int64)}


def draw(scenes: Sequence[Scene] | dict[str, Any], device: torch.device | str = "cpu") -> Tensor:
    """Pictures, uint8 ``[scene, RGB, 112, 112]``.

    Each is a background (two colours, a horizon, soft spots), mats, objects blended in by their contrast, what stands in
    front of them, then light, fog and noise. All noise is a hash of the scene's seed and the pixel, so that two scenes that
    differ in one object differ in its pixels only.

    Args:
        scenes: scenes, or what :func:`pack` made of them.
        device: where to draw.
    """
    packed = scenes if isinstance(scenes, dict) else pack(scenes)
    where = torch.device(device)
    objects, air, paint = (torch.as_tensor(packed[key], device=where) for key in ("objects", "air", "paint"))
    image = _background(air, paint)
    clutter = _table([s.clutter for s in SETTINGS], where)[air[:, 2].long()]
    ys, xs = torch.meshgrid(*[torch.arange(SIZE, device=where) + 0.5] * 2, indexing="ij")
    for slot in range(objects.shape[1]):
        image = _object(image, objects[:, slot], xs, ys, clutter)
    image = image * torch.where(air[:, 1] > 0, 1.0, 0.62)[:, None, None, None]
    clarity = air[:, 0, None, None, None]
    fog = torch.tensor(FOG, device=where)[None, :, None, None]
    image = clarity * image + (1 - clarity) * fog
    image = image + (0.02 + 0.10 * (1 - clarity)) * _noise(paint, SIZE)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def picture(scene: Scene) -> Image.Image:
    """One scene as an RGB picture of 112 x 112 pixels."""
    return Image.fromarray(draw([scene])[0].permute(1, 2, 0).numpy())


def _object(image: Tensor, one: Tensor, xs: Tensor, ys: Tensor, clutter: Tensor) -> Tensor:
    """Draw the objects of one slot of every scene; slots without one change nothing."""
    there = (one[:, SPRITE] >= 0).float()[:, None, None]
    at = [one[:, n, None, None] for n in range(one.shape[1])]
    half = at[WIDE].clamp(min=1) / 2
    u, v = (xs - at[X]) / half, (ys - at[Y]) / half
    mats = _table(list(MATS.values()), image.device)[one[:, MAT].clamp(min=0).long()]
    disc = ((1.15 - torch.hypot(u, (v - MAT_SIZE) * 2.2)) * half / 1.5).clamp(0, 1)
    cover = (disc * there * (at[MAT] >= 0) * at[CONTRAST])[:, None]
    image = image * (1 - cover) + mats[:, :, None, None] * cover
    cos, sin = at[TILT].cos(), at[TILT].sin()
    flip = 1 - 2 * at[MIRRORED]
    grid = torch.stack(((u * cos + v * sin) * flip, v * cos - u * sin), dim=-1)
    sprites = atlas(str(image.device))[one[:, SPRITE].clamp(min=0).long()]
    drawn = F.grid_sample(sprites, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    drawn = drawn * (at[CONTRAST] * there)[:, None]
    image = image * (1 - drawn[:, 3:]) + drawn[:, :3]
    # What hides an object covers its share of the box from one side.
    along = torch.where(at[SIDE] == 0, u, torch.where(at[SIDE] == 1, -u, torch.where(at[SIDE] == 2, v, -v)))
    inside = (u.abs() <= 1) & (v.abs() <= 1) & (along < 2 * at[HIDDEN] - 1) & (at[HIDDEN] > 0)
    cover = (inside.float() * there)[:, None]
    return image * (1 - cover) + clutter[:, :, None, None] * cover


def _background(air: Tensor, paint: Tensor) -> Tensor:
    setting = air[:, 2].long()
    first, second, third = (_hash(paint, salt) for salt in (1, 2, 3))
    far = _table([c for s in SETTINGS for c in s.far], air.device).view(len(SETTINGS), 2, 3)
    near = _table([c for s in SETTINGS for c in s.near], air.device).view(len(SETTINGS), 2, 3)
    top = far[setting, (first > 0.5).long()][:, :, None, None]
    bottom = near[setting, (second > 0.5).long()][:, :, None, None]
    rows = torch.arange(SIZE, device=air.device)[None, :] + 0.5
    below = ((rows - (0.3 + 0.4 * third)[:, None] * SIZE) / 2).clamp(0, 1)[:, None, :, None]
    spots = F.interpolate(_noise(paint + 7, 8), (SIZE, SIZE), mode="bilinear", align_corners=False)
    return top * (1 - below) + bottom * below + 0.06 * spots


def _noise(seed: Tensor, edge: int) -> Tensor:
    """Noise of mean 0 and variance 1, ``[scene, 3, edge, edge]``: the sum of two uniforms, by hash."""
    at = torch.arange(3 * edge * edge, device=seed.device, dtype=torch.int32).view(1, 3, edge, edge)
    base = (seed.view(-1, 1, 1, 1) * 92821 & 0x3FFFFFFF).to(torch.int32)
    return (_mix(base + at * 2 + 1) + _mix(base + at * 2 + 2) - 1) * 6**0.5


def _hash(seed: Tensor, salt: int) -> Tensor:
    return _mix((seed * 92821 - salt & 0x3FFFFFFF).to(torch.int32))


def _mix(value: Tensor) -> Tensor:
    """A uniform number in [0, 1) for every int32: a multiply-xorshift hash, the same on every device."""
    x = value & 0x7FFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
        x = ((x ^ (x >> 12)) * 0x297A2D39) & 0x7FFFFFFF
    return (x ^ (x >> 15)).to(torch.float32) / 2147483648.0


def _table(colours: Sequence[tuple[float, float, float]], device: torch.device) -> Tensor:
    return _tensor(tuple(colours), str(device))


@functools.cache
def _tensor(colours: tuple[tuple[float, float, float], ...], device: str) -> Tensor:
    return torch.tensor(colours, dtype=torch.float32, device=device)
