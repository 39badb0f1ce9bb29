"""Classification of the images of a folder (:class:`ImageFolder`)."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from probes.samples import ImagePrompt, ProbeError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MEGAPIXEL = 1_000_000


class Skipped(NamedTuple):
    """An image that was left out, and why."""

    file: Path
    reason: str


@dataclass(frozen=True)
class ImageSample(ImagePrompt):
    """One image.

    Attributes:
        label: what the folder or the list calls it; of an unlabelled folder the model's own name of its prediction.
        target: the model's class of that name.
        judged_by: ``"label"``, or ``"prediction"`` of the unedited model.
    """

    label: str = ""
    target: int = 0
    judged_by: Literal["label", "prediction"] = "label"


class ImageSamples(list[ImageSample]):
    """Samples of a folder, with the images that were left out in ``skipped``."""

    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True)
class ImageFolder:
    """Images of a folder and the classes they belong to, for a model that classifies images.

    Three forms: a sub-folder for each class; a flat folder with ``labels``; a flat folder without. In the last form there is
    no truth: each image is judged against what the model itself said when the samples were built (so build them outside any
    session), and a rate is the share of predictions that an edit leaves as they were.

    Args:
        path: the folder.
        labels: names of classes by file name: a mapping, a CSV file (columns ``file`` and ``label``), or a JSON file (an
            object, or a list of objects with ``file`` and ``label``); of a flat folder.
        classes: the model's class of each label (its name or number). None looks labels up among the model's own names, whole
            or as one of several between commas ("tabby" for "tabby, tabby cat"), whatever their case, and takes a number as
            the number of a class.
        max_pixels: the largest image, width times height.
        on_error: ``"raise"`` at the first image that is corrupt, too large or without a label, or ``"skip"`` and warn with
            their number; they are listed in the samples' ``skipped``.
        limit: at most so many images, in the order of their names; None is all.
    """

    needs: ClassVar[tuple[str, ...]] = ("images", "model")
    judges: ClassVar[str] = "class"

    path: str | Path
    labels: Mapping[str, str] | str | Path | None = field(default=None)
    classes: Mapping[str, str | int] | None = None
    max_pixels: int = 50 * MEGAPIXEL
    on_error: Literal["raise", "skip"] = "raise"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.max_pixels < 1 or (self.limit is not None and self.limit < 1):
            raise ProbeError(f"max_pixels and limit must be at least 1, got {self.max_pixels}, {self.limit}")
        if self.on_error not in ("raise", "skip"):
            raise ProbeError(f"on_error must be 'raise' or 'skip', got {self.on_error!r}")

    def build(self, model: Any) -> ImageSamples:
        """The samples for one model, by file name. Every image is read once, so that what cannot be read is known early.

        Raises:
            ProbeError: no such folder, no images, labels that do not fit the files or the model, a model that does not
                classify images, or (unless ``on_error="skip"``) an image that is corrupt or too large.
        """
        names = class_names(model)
        labelled = self._files()
        samples, skipped = ImageSamples(), list[Skipped]()
        for file, label in labelled:
            try:
                check_image(file, self.max_pixels)
                if label is None and self.labels is not None:
                    raise ProbeError(f"labels must have an entry for every image, and have none for {str(file)!r}")
            except ProbeError as error:
                if self.on_error == "raise":
                    raise
                skipped.append(Skipped(file, str(error)))
                continue
            # A label that the model does not know is a wrong list, not a damaged image: never skipped.
            if label is not None:
                samples.append(ImageSample((), "", file, model, False, label, self._target(label, names), "label"))
            else:
                target = _predict(model, file)
                samples.append(ImageSample((), "", file, model, False, names[target], target, "prediction"))
        samples.skipped = tuple(skipped)
        if skipped:
            warnings.warn(f"skipped {len(skipped)} of {len(labelled)} images, first: {skipped[0].reason}", stacklevel=2)
        return samples

    def judge(self, sample: ImageSample, predicted: int | None) -> bool:
        """Is the predicted class the image's? None (no class at all) is wrong."""
        return predicted == sample.target

    def _files(self) -> list[tuple[Path, str | None]]:
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise ProbeError(f"path must be a folder of images, got {str(folder)!r}")
        flat = _images(folder)
        classes = {sub.name: _images(sub) for sub in sorted(folder.iterdir()) if sub.is_dir()}
        if self.labels is None and any(classes.values()):
            if flat:
                raise ProbeError(f"path must have images in sub-folders or beside them, not both, got {str(folder)!r}")
            found: list[tuple[Path, str | None]] = [(file, name) for name, files in classes.items() for file in files]
        elif self.labels is None:
            found = [(file, None) for file in flat]
        else:
            table = read_labels(self.labels)
            missing = sorted(set(table) - {file.name for file in flat})
            if missing:
                raise ProbeError(
                    f"labels must name files of {str(folder)!r}, and {missing[0]!r} is none ({len(missing)} in all)"
                )
            found = [(file, table.get(file.name)) for file in flat]
        if not found:
            raise ProbeError(f"path must have at least one image ({', '.join(SUFFIXES)}), got {str(folder)!r}")
        return found[: self.limit]

    def _target(self, label: str, names: dict[int, str]) -> int:
        wanted: Any = label if self.classes is None else self.classes.get(label)
        if wanted is None:
            raise ProbeError(f"classes must have an entry for every label, and have none for {label!r}")
        if str(wanted).strip().isdigit() and int(wanted) in names:
            return int(wanted)
        wanted = str(wanted).strip().lower()
        whole = [i for i, name in names.items() if name.lower() == wanted]
        parts = whole or [i for i, name in names.items() if wanted in [p.strip() for p in name.lower().split(",")]]
        if len(parts) != 1:
            near = get_close_matches(wanted, [name.lower() for name in names.values()], 3, 0.5)
            why = "none" if not parts else f"{len(parts)}"
            raise ProbeError(f"label {label!r} must be one of the model's classes, and is {why} of them; near: {near}")
        return parts[0]


def read_labels(labels: Mapping[str, str] | str | Path) -> dict[str, str]:
    """Label of each file name; see :class:`ImageFolder`.

    Raises:
        ProbeError: a file that cannot be read, or of another form, or with two labels for one name.
    """
    if isinstance(labels, Mapping):
        return {str(k): str(v) for k, v in labels.items()}
    file = Path(labels).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".json":
            data = json.loads(text)
            rows: Any = data.items() if isinstance(data, dict) else [(row["file"], row["label"]) for row in data]
        else:
            table = csv.DictReader(text.splitlines())
            rows = [(row["file"], row["label"]) for row in table]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ProbeError(
            f"labels must be CSV with columns file and label, or JSON of the same, got {str(file)!r}: {error!r}"
        ) from error
    found: dict[str, str] = {}
    for name, label in rows:
        if not isinstance(name, str) or label is None or found.get(name, str(label)) != str(label):
            raise ProbeError(f"labels must have one label a file, and {str(file)!r} has not for {name!r}")
        found[name] = str(label)
    return found


def check_image(file: Path, max_pixels: int) -> None:
    """Read an image wholly.

    Raises:
        ProbeError: it is corrupt or has more than ``max_pixels`` pixels (found out before they are decoded).
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that our own limit allows, and of damage that it then raises for.
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ProbeError(
                        f"image {str(file)!r} must have at most {max_pixels:,} pixels, got {width} x {height}"
                    )
                image.load()
    except Image.DecompressionBombError as error:
        raise ProbeError(f"image {str(file)!r} must have at most {max_pixels:,} pixels: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        # Pillow's readers of damaged files raise all of these. ProbeError is a ValueError too.
        if isinstance(error, ProbeError):
            raise
        raise ProbeError(f"image {str(file)!r} must be a readable image file: {error}") from error


def class_names(model: Any) -> dict[int, str]:
    """Name of each class of a model that classifies images.

    Raises:
        ProbeError: it does not, or has nothing to read images with.
    """
    if not hasattr(model, "processor") or not callable(getattr(model, "encode", None)):
        raise ProbeError(f"an image probe needs an interp.Model, got {type(model).__name__}")
    name = type(model.module).__name__
    if getattr(model.module, "main_input_name", None) != "pixel_values" or "Classification" not in name:
        raise ProbeError(f"model must classify images, such as ViTForImageClassification, got {name}")
    if model.processor is None:
        raise ProbeError(f"an image probe needs an image processor, and {model.name} has none; pass processor=")
    return {int(i): str(text) for i, text in model.config.id2label.items()}


def _images(folder: Path) -> list[Path]:
    files: Iterable[Path] = folder.iterdir()
    return sorted(f for f in files if f.is_file() and f.suffix.lower() in SUFFIXES and not f.name.startswith("."))


def _predict(model: Any, file: Path) -> int:
    import torch

    with torch.no_grad():
        return int(model(model.encode(image=file)).logits[0].argmax())
