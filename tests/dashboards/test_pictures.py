from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dashboards.maps import Look, MapCache, looked, rings, sink_columns
from dashboards.pictures import MISSING, Pyramid, indices, palette, png, sprite


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_palettes_begin_and_end_with_their_anchors() -> None:
    viridis = palette("viridis")
    assert viridis.shape == (255, 3)
    assert viridis[0].tolist() == [0x44, 0x01, 0x54] and viridis[-1].tolist() == [0xFD, 0xE7, 0x25]
    # Equal steps between anchors: the 254 steps of 9 intervals.
    assert palette("grey")[127].tolist() == [128, 128, 128]
    with pytest.raises(ValueError, match="palette must be one of"):
        palette("nonsense")


def test_indices_by_hand() -> None:
    values = np.array([0.0, 0.25, 0.5, 1.0, 2.0, -1.0, np.nan], np.float32)
    assert indices(values, 1.0).tolist() == [0, 64, 127, 254, 254, 0, MISSING]
    assert indices(values[:3], 1.0, 0.5).tolist() == [0, 127, 180]
    assert indices(values[:3], 0.0).tolist() == [0, 0, 0], "a scale without a top is all lowest colour"


def test_a_picture_has_the_palettes_colours_and_transparent_gaps() -> None:
    image = Image.open(io.BytesIO(png(np.array([[0, 254, MISSING]], np.uint8)))).convert("RGBA")
    got = [image.getpixel((x, 0)) for x in range(3)]
    assert got[0] == (0x44, 0x01, 0x54, 255) and got[1] == (0xFD, 0xE7, 0x25, 255) and got[2][3] == 0


def test_the_sprite_puts_each_head_at_its_place() -> None:
    pooled = np.zeros((2, 3, 4, 4), np.float32)
    pooled[1, 2, 0, 3] = 1.0
    got = pixels(sprite(pooled, 1.0, 1.0))
    assert got.shape == (8, 12) and got[4, 11] == 254 and got.sum() == 254


def test_a_sink_column_one_cell_wide_survives_pooling() -> None:
    values = np.zeros((3000, 3000), np.float32)
    values[:, 1501] = 0.7
    pyramid = Pyramid(values)
    tile = pyramid.tile(0, 3000, 0, 3000, 750, top=0.7, gamma=1.0)
    assert tile.step == 4 and (tile.x0, tile.x1, tile.y0, tile.y1) == (0, 3000, 0, 3000)
    got = pixels(tile.data)
    assert got.shape == (750, 750) and set(np.flatnonzero(got[0])) == {1501 // 4} and got[:, 1501 // 4].min() == 254


@pytest.mark.parametrize(
    "box", [(0, 3000, 0, 3000), (10, 90, 2000, 2100), (100, 1700, 5, 1405), (2999, 3000, 0, 1), (-5, 9e4, -3, 7)]
)
def test_a_tile_is_the_maximum_of_the_cells_it_says_it_covers(box: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).random((3000, 3001)).astype(np.float32)
    tile = Pyramid(values).tile(*(int(v) for v in box), 600, top=1.0, gamma=1.0)
    x0, x1, y0, y1 = (max(0, int(v)) for v in box)
    assert tile.x0 <= x0 and tile.y0 <= y0 and tile.x1 >= min(x1, 3001) and tile.y1 >= min(y1, 3000)
    got, part = pixels(tile.data), values[tile.y0 : tile.y1, tile.x0 : tile.x1]
    assert max(got.shape) <= 1250
    step = tile.step
    for row in {0, got.shape[0] - 1, got.shape[0] // 2}:
        for column in {0, got.shape[1] - 1, got.shape[1] // 2}:
            cell = part[row * step : (row + 1) * step, column * step : (column + 1) * step]
            assert got[row, column] == indices(cell.max()[None], 1.0)[0]


def test_missing_cells_lose_against_any_number_when_pooled() -> None:
    values = np.full((1000, 1000), np.nan, np.float32)
    values[0, 0] = 0.5
    top = Pyramid(values).levels[-1]
    assert top[0, 0] == 0.5 and np.isnan(top[1, 1])


def test_looks() -> None:
    values = np.array([[0.5, 0.5], [0.9, 0.1]], np.float32)
    np.testing.assert_allclose(looked(values, Look(normalise=True)), [[1, 1], [1, 0.1 / 0.9]], rtol=1e-6)
    hidden = looked(values, Look(normalise=True, hide=(0, 77)))
    assert np.isnan(hidden[:, 0]).all() and hidden[:, 1].tolist() == [1, 1]
    assert values[0, 0] == 0.5, "the map itself stays"
    assert Look.parse("1", "5,0,5") == Look(True, (0, 5))
    for bad in ("a", "1,-2", ",".join(map(str, range(65)))):
        with pytest.raises(ValueError, match="hide must be"):
            Look.parse("0", bad)


def test_sink_columns_are_means_over_the_rows_that_see_a_key() -> None:
    received, rows = np.array([8.0, 0.5, 3.0, 1.0]), np.array([10, 9, 5, 1])
    assert sink_columns(received, rows) == [0, 2], "0.8 and 0.6; the last key is seen by one row only"
    assert sink_columns(received, rows, 0.7) == [0]


def test_rings_by_hand() -> None:
    # A 2 x 2 grid: each patch has itself (0 steps) and three others one step away.
    row, column = [0, 0, 1, 1], [0, 1, 0, 1]
    k, mass = rings(np.full((4, 4), 0.25, np.float32), row, column)
    assert k == [0, 1]
    np.testing.assert_allclose(mass, [0.25, 0.75])
    _, mass = rings(np.eye(4, dtype=np.float32), row, column)
    np.testing.assert_allclose(mass, [1, 0])


def test_the_cache_forgets_the_oldest() -> None:
    cache = MapCache(limit=3 * 100 * 100 * 4)
    made: list[int] = []

    def make(n: int) -> np.ndarray:
        made.append(n)
        return np.full((100, 100), n, np.float32)

    for n in (0, 1, 2, 0, 3, 0, 1):
        assert cache.get(n, lambda n=n: make(n)).levels[0][0, 0] == n
    assert made == [0, 1, 2, 3, 1] and len(cache) == 3
