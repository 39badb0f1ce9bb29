"""Readers of COCO's own files: ``instances_*.json`` and ``captions_*.json``, and the truth CHAIR and POPE take from them.

The whole file is held in memory while it is read (``instances_train2017.json``, 450 MB, needs about 3 GB); what is returned
is small.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.mentions import Matcher
from probes.samples import ProbeError

PathLike = str | Path


@dataclass(frozen=True)
class Instances:
    """What ``instances_*.json`` says.

    Attributes:
        files: image id to file name, every image of the file.
        objects: image id to the names of its categories, each once, in the order of the annotations (POPE's building rule
            takes the first ones); an image without annotations has none.
        categories: every category name, in the order of the file.
    """

    files: Mapping[int, str]
    objects: Mapping[int, tuple[str, ...]]
    categories: tuple[str, ...]


def read_instances(path: PathLike | Sequence[PathLike], *, crowds: bool = True) -> Instances:
    """Read one or several ``instances_*.json`` (CHAIR takes train and val together).

    Args:
        path: the file, or several.
        crowds: count annotations of crowds (``iscrowd``), as CHAIR does.

    Raises:
        ProbeError: a missing, damaged or other file, an annotation whose image or category is not in the file, an image id
            that two files have.
    """
    files: dict[int, str] = {}
    objects: dict[int, dict[str, None]] = {}
    categories: dict[str, None] = {}
    for one in _paths(path):
        data = _load(one, kind="instances", needs=("images", "annotations", "categories"))
        names = {_key(c, "id", one, "categories", n): _name(c, one, n) for n, c in enumerate(data["categories"])}
        if not names:
            raise ProbeError(f"categories must not be empty in {one}")
        mine = _images(data, one)
        if twice := files.keys() & mine.keys():
            raise ProbeError(f"an image must be in one file only, got image id {min(twice)} again in {one}")
        files |= mine
        objects |= {image: {} for image in mine}
        categories |= dict.fromkeys(names.values())
        for n, annotation in enumerate(data["annotations"]):
            image = _key(annotation, "image_id", one, "annotations", n)
            category = _key(annotation, "category_id", one, "annotations", n)
            if image not in mine:
                raise ProbeError(f"image_id must be an image of the file, got {image} in annotations[{n}] of {one}")
            if category not in names:
                raise ProbeError(
                    f"category_id must be a category of the file, got {category} in annotations[{n}] of {one}"
                )
            if crowds or not annotation.get("iscrowd"):
                objects[image][names[category]] = None
    return Instances(files, {image: tuple(found) for image, found in objects.items()}, tuple(categories))


def read_captions(path: PathLike | Sequence[PathLike]) -> dict[int, tuple[str, ...]]:
    """Image id to its reference captions, from one or several ``captions_*.json``; an image without any has none.

    Raises:
        ProbeError: as :func:`read_instances`, and a caption that is no text.
    """
    captions: dict[int, list[str]] = {}
    for one in _paths(path):
        data = _load(one, kind="captions", needs=("images", "annotations"))
        mine: dict[int, list[str]] = {image: [] for image in _images(data, one)}
        if twice := captions.keys() & mine.keys():
            raise ProbeError(f"an image must be in one file only, got image id {min(twice)} again in {one}")
        for n, annotation in enumerate(data["annotations"]):
            image = _key(annotation, "image_id", one, "annotations", n)
            if image not in mine:
                raise ProbeError(f"image_id must be an image of the file, got {image} in annotations[{n}] of {one}")
            text = annotation.get("caption")
            if not isinstance(text, str):
                raise ProbeError(f"caption must be a text, got {text!r} in annotations[{n}] of {one}")
            mine[image].append(text)
        captions |= mine
    return {image: tuple(texts) for image, texts in captions.items()}


def coco_truth(
    instances: Instances,
    captions: Mapping[int, Sequence[str]] | None = None,
    *,
    matcher: Matcher | None = None,
    images: Iterable[int] | None = None,
) -> dict[int, tuple[str, ...]]:
    """Image id to the objects that are in it.

    CHAIR's truth is the union of the annotated instances and of what the matcher finds in the reference captions, which
    mention objects that were not annotated; POPE's is the instances alone.

    Args:
        instances: of :func:`read_instances`.
        captions: of :func:`read_captions`; None for the instances only.
        matcher: the one that judges; needed with ``captions``.
        images: only these; None for all.

    Raises:
        ProbeError: captions without a matcher, captions of no image of ``images``, an id that ``instances`` has not.
    """
    chosen = list(instances.objects if images is None else images)
    if unknown := [image for image in chosen if image not in instances.objects]:
        raise ProbeError(f"images must be in instances, got {len(unknown)} others, first {unknown[0]!r}")
    if captions is None:
        return {image: instances.objects[image] for image in chosen}
    if matcher is None:
        raise ProbeError("matcher must be given with captions: it finds the objects in them")
    if without := [image for image in chosen if not captions.get(image)]:
        raise ProbeError(
            f"captions must have every image, got none for {len(without)} of {len(chosen)}, first {without[0]}"
        )
    return {
        image: tuple(dict.fromkeys([*instances.objects[image], *_mentioned(captions[image], matcher)]))
        for image in chosen
    }


def image_id(file_name: str) -> int:
    """The id in a COCO file name: 310196 of ``COCO_val2014_000000310196.jpg`` and of ``000000310196.jpg``.

    Raises:
        ProbeError: a name of another form.
    """
    found = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})\.\w+", Path(file_name).name)
    if not found:
        raise ProbeError(f"file_name must be of COCO's form, such as COCO_val2014_000000310196.jpg, got {file_name!r}")
    return int(found[1])


def _mentioned(texts: Sequence[str], matcher: Matcher) -> list[str]:
    return [mention.name for text in texts for mention in matcher(text)]


def _paths(path: PathLike | Sequence[PathLike]) -> list[Path]:
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(p) for p in path]
    if not paths:
        raise ProbeError("path must be at least one file, got none")
    return paths


def _load(path: Path, *, kind: str, needs: tuple[str, ...]) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ProbeError(f"path must be a readable {kind}_*.json, got {str(path)!r}: {error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProbeError(f"{path} must be JSON, and is damaged or cut short: {error}") from error
    if not isinstance(data, dict):
        raise ProbeError(
            f"{path} must be COCO's {kind}_*.json, an object with {list(needs)}, got a {type(data).__name__}"
        )
    for part in needs:
        if not isinstance(data.get(part), list):
            raise ProbeError(
                f"{path} must be COCO's {kind}_*.json with a list {part!r}, got the keys {sorted(data)[:8]}{_looks(data)}"
            )
    mark = "category_id" if kind == "instances" else "caption"
    first = next(iter(data["annotations"]), None)
    if isinstance(first, dict) and mark not in first:
        raise ProbeError(f"{path} must be COCO's {kind}_*.json, whose annotations have {mark!r}{_looks(data)}")
    return data


def _looks(data: dict[str, Any]) -> str:
    """What the file seems to be, for a message."""
    annotations = data.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    if isinstance(first, dict):
        if "caption" in first:
            return "; it looks like captions_*.json"
        if "keypoints" in first:
            return "; it looks like person_keypoints_*.json"
        if "category_id" in first:
            return "; it looks like instances_*.json"
    return ""


def _images(data: dict[str, Any], path: Path) -> dict[int, str]:
    return {
        _key(image, "id", path, "images", n): str(image.get("file_name", "")) for n, image in enumerate(data["images"])
    }


def _key(entry: Any, name: str, path: Path, part: str, n: int) -> int:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, int) or isinstance(value, bool):
        got = f"{value!r}" if isinstance(entry, dict) and name in entry else "none"
        raise ProbeError(f"{name} must be a whole number in {part}[{n}] of {path}, got {got}")
    return value


def _name(category: dict[str, Any], path: Path, n: int) -> str:
    name = category.get("name")
    if not isinstance(name, str) or not name:
        raise ProbeError(f"name must be a text in categories[{n}] of {path}, got {name!r}")
    return name
