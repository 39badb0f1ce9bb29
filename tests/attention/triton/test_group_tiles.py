"""Tables of key groups by tile: answers by hand, and against the same said in plain Python."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from interp.attention.triton.group_tiles import CHUNK, GroupTiles, group_table
from interp.attention.triton.launching import placeholder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tensor(*samples: list[int]) -> torch.Tensor:
    return torch.tensor(samples, dtype=torch.int8, device=DEVICE)


def table(numbers: list[int], bn: int, source: int = 0, target: int = 0) -> list[int]:
    groups = tensor(numbers)
    return GroupTiles(groups, bn, source, target)(groups)[0].tolist()


def run_from(kinds: list[object], tile: int) -> int:
    """How many tiles from this one on are of its kind."""
    stop = tile
    while stop < len(kinds) and kinds[stop] == kinds[tile]:
        stop += 1
    return stop - tile


def restated(numbers: list[int], bn: int, source: int = 0, target: int = 0) -> list[int]:
    tiles = [set(numbers[at : at + bn]) for at in range(0, len(numbers), bn)]
    only = [min(tile) if len(tile) == 1 else -2 for tile in tiles]
    rest = max(range(8), key=only.count)  # of equals the first
    of_rest: list[object] = [number == rest for number in only]
    runs = [run_from(of_rest, tile) * (1 if inside else -1) for tile, inside in enumerate(of_rest)]
    out = [*only, rest, *runs]
    if not source | target:
        return out
    sets = [[g for g in range(8) if bits >> g & 1] for bits in (target, source)]
    listed = [tile for tile, number in enumerate(only) if number == -2 or number in sets[0] + sets[1]]
    before = [sum(tile < stop for tile in listed) for stop in range(len(tiles) + 1)]
    kinds: list[object] = [next((kind for kind in (1, 2) if number in sets[kind - 1]), 0) for number in only]
    lengths = [run_from(kinds, tile) if kinds[tile] else 0 for tile in range(len(tiles))]
    first = lengths.index(max(lengths))
    run = [first, first + lengths[first], kinds[first]] if lengths[first] else [0, 0, 0]
    return [*out, *before, *listed, *[len(tiles)] * (len(tiles) - len(listed)), *run]  # pyright: ignore[reportReturnType]


def test_the_groups_of_tiles_by_hand() -> None:
    # Tiles of 2: [0 0] [0 1] [1 1] [1 1] [2]; group 1 has most tiles.
    assert table([0, 0, 0, 1, 1, 1, 1, 1, 2], 2) == [0, -2, 1, 1, 2, 1, -2, -1, 2, 1, -1]
    # Nobody's keys (-1) are a group of their own here; of equals the lowest is the rest.
    assert table([-1, -1, 3, 3, 0, 0], 2) == [-1, 3, 0, 0, -2, -1, 1]
    assert table([5], 4) == [5, 5, 1]
    # No tile is of one group: group 0 stands for the rest, and no tile is of it.
    assert table([0, 1, 1, 2], 2) == [-2, -2, 0, -2, -1]


def test_tiles_whose_mass_moves_by_hand() -> None:
    # Tiles of 2: [0 0] source, [0 1] mixed, [1 1] neither, [2 2] target, nobody's.
    moved = table([0, 0, 0, 1, 1, 1, 2, 2, -1, -1], 2, 0b001, 0b100)[11:]
    assert moved == [0, 1, 2, 2, 3, 3, 0, 1, 3, 5, 5, 0, 1, 2]
    # [2 2] [0 0] [0 0] [2 2] [3 3] [1]: two targets in a row of unlike groups are one run, as long as the sources' before it.
    moved = table([2, 2, 0, 0, 0, 0, 2, 2, 3, 3, 1], 2, 0b0001, 0b1100)[13:]
    assert moved == [0, 1, 2, 3, 4, 5, 5, 0, 1, 2, 3, 4, 6, 1, 3, 2]
    assert table([1, 1, 1], 2, 0b001, 0b100)[5:] == [0, 0, 0, 2, 2, 0, 0, 0]


@pytest.mark.parametrize("moves", [(0, 0), (0b00000101, 0b10000010)], ids=["plain", "moved"])
@pytest.mark.parametrize("n_keys", [1, 31, 4 * CHUNK, 4 * CHUNK + 1, 9 * CHUNK - 3, 1200])
def test_the_table_is_what_plain_python_makes_of_the_groups(n_keys: int, moves: tuple[int, int]) -> None:
    bn = 4
    random = torch.Generator().manual_seed(n_keys)
    samples: list[list[int]] = []
    for typical in (2, 40, 700):  # keys of a stretch of one group: runs within a chunk of tiles, and over several
        numbers: list[int] = []
        while len(numbers) < n_keys:
            length = int(typical * 2 * torch.rand((), generator=random)) + 1
            numbers += [int(torch.randint(-1, 8, (), generator=random))] * length
        samples.append(numbers[:n_keys])
    groups = tensor(*samples)
    found = GroupTiles(groups, bn, *moves)(groups)
    assert found.dtype == torch.int32
    for row, numbers in zip(found.tolist(), samples, strict=True):
        assert row == restated(numbers, bn, *moves)


def test_rows_of_a_wider_tensor() -> None:
    wide = tensor([0, 0, 1, 1, 7, 7], [2, 2, 2, 3, 7, 7])
    groups = wide[:, :4]
    found = GroupTiles(groups, 2, 0b1, 0b10)(groups).tolist()
    assert found == [restated(row, 2, 0b1, 0b10) for row in groups.tolist()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes the interpreter ten seconds")
def test_runs_longer_than_a_short_integer() -> None:
    bn, n_tiles = 16, 33_000
    groups = torch.ones(1, n_tiles * bn, dtype=torch.int8, device=DEVICE)
    groups[:, :5] = 0
    found = GroupTiles(groups, bn, 0b10, 0b1)(groups)[0]
    assert found[[0, 1, n_tiles, n_tiles + 1, n_tiles + 2]].tolist() == [-2, 1, 1, -1, n_tiles - 1]
    assert found[-3:].tolist() == [1, n_tiles, 2]


def test_layers_that_share_their_groups_share_the_table_until_the_groups_change() -> None:
    groups = tensor([0, 0, 1, 1])
    tiles = GroupTiles(groups, 2)
    first = tiles(groups)
    assert tiles(groups) is first
    assert GroupTiles(groups, 2)(groups) is first
    assert GroupTiles(groups, 4)(groups).tolist() == [[-2, 0, -1]]
    assert GroupTiles(groups, 2, 0b1, 0b10)(groups).shape == (1, 13)
    groups[:] = 1
    assert tiles(groups)[0, :2].tolist() == [1, 1]


def test_nothing_is_kept_on_groups_made_in_inference_mode() -> None:
    with torch.inference_mode():
        groups = tensor([0, 0, 1, 1])
        tiles = GroupTiles(groups, 2)
        assert tiles(groups)[0, :2].tolist() == [0, 1]
        groups[:] = 1
        assert tiles(groups)[0, :2].tolist() == [1, 1]
        assert not [name for name in vars(groups) if name.startswith("_interp")]


def test_without_groups_there_is_a_placeholder() -> None:
    nothing = placeholder(DEVICE)
    assert group_table(None, 16, nothing) == {"table_ptr": nothing, "table_b": 0}
    # One sample's groups stand for all: the stride is 0.
    assert group_table(tensor([0, 0]), 2, nothing)["table_b"] == 0
    assert group_table(tensor([0, 0], [1, 1]), 2, nothing)["table_b"] == 3


def test_groups_that_go_on_after_the_last_key_serve_calls_on_more_keys() -> None:
    wide = tensor([0, 0, 1, 1, 1, 0, 2, 2, 2, 2])
    for n in (6, 10, 6):
        tiles = GroupTiles(wide[:, :n], 2, 1, 2)
        assert tiles(wide)[0].tolist() == restated(wide[0, :n].tolist(), 2, 1, 2)
