"""Batches of scenes for training, made in worker processes: what to paint, token ids, which of them are learned."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scenes_tokenizer import PREFIX, fast_tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from probes.scenes.catalog import INDEX, NAMES
from probes.scenes.language import description, prompt, question
from probes.scenes.painting import pack
from probes.scenes.world import Scene, World

IGNORED = -100


class Pictures(IterableDataset[dict[str, Any]]):
    """Scenes with, for the classifier, which objects they have and which patch shows what."""

    def __init__(self, world: World, batch: int, grid: int = 14) -> None:
        self.world, self.batch, self.grid = world, batch, grid

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = _rng("pictures", self.world.seed)
        while True:
            scenes = [self.world.draw(rng) for _ in range(self.batch)]
            yield {**pack(scenes), "present": present(scenes), "patches": patches(scenes, self.grid)}


class Conversations(IterableDataset[dict[str, Any]]):
    """Conversations about scenes (or, ``images=False``, captions without a picture, from the text prior).

    Half of the conversations begin with a caption, the others are four to six questions. Token ids are those behind the
    image; labels mark the assistant's words.
    """

    def __init__(self, world: World, batch: int, length: int, *, images: bool = True) -> None:
        self.world, self.batch, self.length, self.images = world, batch, length, images

    def __iter__(self) -> Iterator[dict[str, Any]]:
        kind = "image" if self.images else "text"
        rng = _rng(f"conversations {kind}", self.world.seed)
        tokenizer = fast_tokenizer()
        other = self.world.draw(rng)
        while True:
            scenes = [self.world.draw(rng) for _ in range(self.batch)]
            texts: list[list[tuple[str, bool]]] = []
            for scene in scenes:
                texts.append(conversation(scene, other, rng, images=self.images))
                other = scene
            made = tokens(tokenizer, texts, self.length, images=self.images)
            yield {**(pack(scenes) if self.images else {}), **made}


def conversation(scene: Scene, other: Scene, rng: random.Random, *, images: bool) -> list[tuple[str, bool]]:
    """Pieces of text, and whether they are the assistant's; the image's place comes before the first."""
    if not images:
        turns = [description(scene, rng)]
    elif rng.random() < 0.5:
        turns = [description(scene, rng), *(question(scene, other, rng) for _ in range(rng.randint(0, 2)))]
    else:
        turns = [question(scene, other, rng) for _ in range(rng.randint(4, 6))]
    pieces: list[tuple[str, bool]] = []
    for number, turn in enumerate(turns):
        asked = prompt(turn.request, image=False)
        if images and number == 0:
            asked = asked.removeprefix("USER:")
        pieces += [(asked, False), (f" {turn.answer}</s>", True)]
    return pieces


def tokens(
    tokenizer: Any, texts: list[list[tuple[str, bool]]], length: int, *, images: bool
) -> dict[str, np.ndarray[Any, Any]]:
    """``ids`` and ``labels``, int64 ``[conversation, length]``: cut or padded on the right."""
    flat = tokenizer.encode_batch([piece for text in texts for piece, _ in text], add_special_tokens=False)
    ids = np.zeros((len(texts), length), dtype=np.int64)
    labels = np.full((len(texts), length), IGNORED, dtype=np.int64)
    at = 0
    for n, text in enumerate(texts):
        row: list[int] = [] if images else [PREFIX[0]]
        learned: list[int] = [IGNORED] * len(row)
        for _, assistant in text:
            piece = flat[at].ids
            at += 1
            row += piece
            learned += piece if assistant else [IGNORED] * len(piece)
        row, learned = row[:length], learned[:length]
        ids[n, : len(row)], labels[n, : len(row)] = row, learned
    return {"ids": ids, "labels": labels}


def present(scenes: list[Scene]) -> np.ndarray[Any, Any]:
    """Which objects are there, bool ``[scene, object]``."""
    table = np.zeros((len(scenes), len(NAMES)), dtype=bool)
    for n, scene in enumerate(scenes):
        table[n, [INDEX[name] for name in scene.names]] = True
    return table


def patches(scenes: list[Scene], grid: int) -> np.ndarray[Any, Any]:
    """What every patch shows, int64 ``[scene, patch]``: an object's number, or their count for none."""
    table = np.full((len(scenes), grid * grid), len(NAMES), dtype=np.int64)
    for n, scene in enumerate(scenes):
        for name in scene.names:
            table[n, scene.patches(name, grid).ravel()] = INDEX[name]
    return table


def stream(data: IterableDataset[Any], workers: int, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """Batches on the device, made ahead by worker processes (0: in this one)."""
    loader = DataLoader(
        data,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=device.startswith("cuda"),
    )
    for batch in loader:
        yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _rng(name: str, seed: int) -> random.Random:
    worker = get_worker_info()
    return random.Random(f"{name} {seed} {worker.id if worker else 0} of {worker.num_workers if worker else 1}")
