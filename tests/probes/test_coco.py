"""COCO's files, hand-made: what they say is read, what is wrong with them is told; and the words for its objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from probes.coco import coco_truth, image_id, read_captions, read_instances
from probes.coco_words import CHAIR_IGNORE, COCO_IGNORE, COCO_WORDS, coco_matcher, read_synonyms
from probes.mentions import Mention, WordMatcher, plurals
from probes.samples import ProbeError

IMAGES = [
    {"id": 310196, "file_name": "COCO_val2014_000000310196.jpg", "width": 640, "height": 480},
    {"id": 9, "file_name": "COCO_val2014_000000000009.jpg", "width": 640, "height": 480},
    {"id": 25, "file_name": "COCO_val2014_000000000025.jpg", "width": 640, "height": 426},
]
CATEGORIES = [
    {"supercategory": "animal", "id": 18, "name": "dog"},
    {"supercategory": "sports", "id": 34, "name": "frisbee"},
    {"supercategory": "person", "id": 1, "name": "person"},
]


def annotation(image: Any, category: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": 1,
        "image_id": image,
        "category_id": category,
        "iscrowd": 0,
        "bbox": [1.0, 2.0, 3.0, 4.0],
        "area": 12.0,
    } | more


def instances() -> dict[str, Any]:
    crowd = annotation(9, 1, iscrowd=1, segmentation={"counts": [1, 2], "size": [480, 640]})
    return {
        "info": {"year": 2014},
        "licenses": [],
        "images": list(IMAGES),
        "annotations": [annotation(310196, 34), annotation(310196, 18), annotation(310196, 34), crowd],
        "categories": list(CATEGORIES),
    }


def captions() -> dict[str, Any]:
    return {
        "info": {},
        "licenses": [],
        "images": list(IMAGES),
        "annotations": [
            {"image_id": 310196, "id": 48, "caption": "A dog catches a frisbee thrown by a man."},
            {"image_id": 9, "id": 49, "caption": "Some people."},
            {"image_id": 310196, "id": 50, "caption": "Puppy on grass"},
            {"image_id": 25, "id": 51, "caption": "Nothing much."},
        ],
    }


def saved(folder: Path, content: Any, name: str = "file.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_instances(tmp_path: Path) -> None:
    path = saved(tmp_path, instances())
    found = read_instances(path)
    # In the order of the annotations, each once; the image without any is there.
    assert found.objects == {310196: ("frisbee", "dog"), 9: ("person",), 25: ()}
    assert found.files[9] == "COCO_val2014_000000000009.jpg" and found.categories == ("dog", "frisbee", "person")
    assert read_instances(str(path), crowds=False).objects[9] == ()


def test_several_files_are_one(tmp_path: Path) -> None:
    whole = instances()
    one = saved(tmp_path, whole | {"images": IMAGES[:1], "annotations": whole["annotations"][:3]}, "train.json")
    two = saved(tmp_path, whole | {"images": IMAGES[1:], "annotations": whole["annotations"][3:]}, "val.json")
    assert read_instances([one, two]) == read_instances(saved(tmp_path, whole))
    with pytest.raises(
        ProbeError, match="an image must be in one file only, got image id 310196 again in .*train.json"
    ):
        read_instances([one, one])
    with pytest.raises(ProbeError, match="at least one file"):
        read_instances([])


def test_captions_and_truth(tmp_path: Path) -> None:
    found = read_captions(saved(tmp_path, captions()))
    assert found == {
        310196: ("A dog catches a frisbee thrown by a man.", "Puppy on grass"),
        9: ("Some people.",),
        25: ("Nothing much.",),
    }
    known = read_instances(saved(tmp_path, instances()))
    matcher = coco_matcher()
    assert coco_truth(known) == known.objects
    # The man was not annotated: only the captions know him.
    assert coco_truth(known, found, matcher=matcher) == {
        310196: ("frisbee", "dog", "person"),
        9: ("person",),
        25: (),
    }
    assert coco_truth(known, images=[9]) == {9: ("person",)}
    with pytest.raises(ProbeError, match="matcher must be given with captions"):
        coco_truth(known, found)
    with pytest.raises(ProbeError, match="images must be in instances, got 1 others, first 7"):
        coco_truth(known, images=[9, 7])
    with pytest.raises(ProbeError, match="captions must have every image, got none for 1 of 3, first 25"):
        coco_truth(known, {k: v for k, v in found.items() if k != 25}, matcher=matcher)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["annotations"].append(annotation(7, 18)),
            r"image_id must be an image of the file, got 7 in annotations\[4\]",
        ),
        (
            lambda d: d["annotations"].append(annotation(9, 99)),
            r"category_id must be a category of the file, got 99 in annot",
        ),
        (
            lambda d: d["annotations"][1].pop("image_id"),
            r"image_id must be a whole number in annotations\[1\] .*, got none",
        ),
        (lambda d: d["annotations"][1].update(category_id="18"), r"category_id must be a whole number .*, got '18'"),
        (lambda d: d["images"][1].pop("id"), r"id must be a whole number in images\[1\] of .*, got none"),
        (lambda d: d["images"].append(5), r"id must be a whole number in images\[3\]"),
        (lambda d: d["categories"][0].pop("name"), r"name must be a text in categories\[0\] of .*, got None"),
        (lambda d: d["categories"].clear(), "categories must not be empty"),
        (
            lambda d: d.pop("categories"),
            r"with a list 'categories', got the keys \['annotations', .*it looks like instances",
        ),
        (lambda d: d.pop("images"), "with a list 'images'"),
    ],
)
def test_damaged_instances(tmp_path: Path, change: Any, message: str) -> None:
    data = json.loads(json.dumps(instances()))
    change(data)
    with pytest.raises(ProbeError, match=message):
        read_instances(saved(tmp_path, data))


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"with a list 'categories'.*it looks like captions_\*\.json"):
        read_instances(saved(tmp_path, captions()))
    with pytest.raises(ProbeError, match=r"whose annotations have 'caption'; it looks like instances_\*\.json"):
        read_captions(saved(tmp_path, instances()))
    with pytest.raises(ProbeError, match=r"must be COCO's instances_\*\.json, an object with .*, got a list"):
        read_instances(saved(tmp_path, [{"image_id": 9, "caption": "A dog."}]))
    with pytest.raises(ProbeError, match="must be JSON, and is damaged or cut short: .*column 980"):
        read_instances(saved(tmp_path, json.dumps(instances())[:-20]))
    (tmp_path / "binary.json").write_bytes(b"\x80\x81\xff")
    with pytest.raises(ProbeError, match="must be JSON, and is damaged"):
        read_captions(tmp_path / "binary.json")
    with pytest.raises(ProbeError, match=r"path must be a readable instances_\*\.json, got .*none\.json"):
        read_instances(tmp_path / "none.json")
    broken = captions()
    broken["annotations"][2]["caption"] = None
    with pytest.raises(ProbeError, match=r"caption must be a text, got None in annotations\[2\]"):
        read_captions(saved(tmp_path, broken))


def test_image_ids_of_file_names() -> None:
    assert image_id("COCO_val2014_000000310196.jpg") == image_id("val2017/000000310196.jpg") == 310196
    with pytest.raises(ProbeError, match=r"of COCO's form, .* got 'cat\.jpg'"):
        image_id("cat.jpg")


def names(text: str, matcher: WordMatcher | None = None) -> list[str]:
    return [mention.name for mention in (matcher or coco_matcher())(text)]


def test_a_mention_is_where_it_is_written() -> None:
    text = "The Hot-Dogs, a dog's dinner."
    found = coco_matcher()(text)
    assert found == [Mention("hot dog", 4, 12), Mention("dog", 16, 19)]
    assert [text[m.start : m.stop] for m in found] == ["Hot-Dogs", "dog"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two men, a woman and their children", ["person"] * 3),
        ("knives, forks, wine glasses and sandwiches", ["knife", "fork", "wine glass", "sandwich"]),
        ("puppies and buses and sheep", ["dog", "bus", "sheep"]),
        ("a baby elephant and an adult dog", ["elephant", "dog"]),
        ("a baby", ["person"]),
        ("a passenger jet", ["airplane"]),
        ("the batter at home plate by the train tracks", ["person"]),
        ("the seat of the toilet, a toilet seat", ["toilet", "toilet"]),
        ("a seat", ["chair"]),
        ("hot, dog", ["dog"]),
        ("a hot. Dog", ["dog"]),
        ("a teddy bear on the dining room table", ["teddy bear", "dining table"]),
        ("cats dogs", ["cat", "dog"]),
        ("catapult, dogma, cupboard, carpet", []),
        ("the catcher's mitt", ["baseball glove"]),
        ("TVs and cell phones", ["tv", "cell phone"]),
        ("", []),
        ("...", []),
        ("hot", []),
    ],
)
def test_coco_words(text: str, expected: list[str]) -> None:
    assert names(text) == expected


def test_the_table_has_the_80_categories_and_each_finds_itself() -> None:
    assert len(COCO_WORDS) == 80
    matcher = coco_matcher()
    for name, forms in COCO_WORDS.items():
        for form in (name, *forms):
            assert names(f"There is a {form}.", matcher) == [name]
            for several in plurals(form):
                assert set(names(f"Some {several}!", matcher)) == {name}, several
    for form in COCO_IGNORE:
        assert names(f"the {form} there", matcher) == []


def test_plurals() -> None:
    assert plurals("wine glass") == {"wine glasses"} and plurals("baby") == {"babies"} and plurals("toy") == {"toys"}
    assert plurals("policeman") == {"policemans", "policemen"} and plurals("bench") == {"benches"}
    assert plurals("potato") == {"potatos", "potatoes"} and plurals("knife") == {"knifes", "knives"}


def test_a_matcher_of_other_names() -> None:
    world = WordMatcher({"ice_cream": ["ice lolly"], "ice": [], "mouse": []}, ignore=["ice age"])
    assert names("Ice creams, an ice-lolly, ice, two mice in the ice age", world) == [
        "ice_cream",
        "ice_cream",
        "ice",
        "mouse",
    ]
    assert world.names == ("ice_cream", "ice", "mouse")
    strict = WordMatcher({"dog": []}, plural=False)
    assert names("dog dogs", strict) == ["dog"]
    # A written form goes before a derived one.
    assert names("glasses", WordMatcher({"glass": [], "spectacles": ["glasses"]})) == ["spectacles"]


def test_bad_matchers() -> None:
    with pytest.raises(ProbeError, match="'bat' for 'baseball bat' and 'flying bat'"):
        WordMatcher({"flying bat": ["bat"], "baseball bat": ["bat"]})
    with pytest.raises(ProbeError, match="a form must stand for one object, got 'axes'"):
        WordMatcher({"ax": [], "axe": []})
    with pytest.raises(ProbeError, match="forms of 'dog' must be a sequence of texts, got 'puppy'"):
        WordMatcher({"dog": "puppy"})
    with pytest.raises(ProbeError, match="at least one word, got '!'"):
        WordMatcher({"dog": ["!"]})
    with pytest.raises(ProbeError, match="names must have at least one object"):
        WordMatcher({})
    with pytest.raises(ProbeError, match="unless must be about forms of names, got 'seat'"):
        WordMatcher({"dog": []}, unless={"seat": "dog"})
    with pytest.raises(ProbeError, match="unless must lead to one of names, got 'toilet'"):
        WordMatcher({"dog": []}, unless={"dog": "toilet"})


def test_synonym_lists(tmp_path: Path) -> None:
    path = saved(tmp_path, "dog, puppy\n\ntoilet\nchair, seat\ntrain,  locomotive \n", "synonyms.txt")
    words = read_synonyms(path)
    assert words == {"dog": ("puppy",), "toilet": (), "chair": ("seat",), "train": ("locomotive",)}
    matcher = coco_matcher(words, ignore=CHAIR_IGNORE)
    text = "An adult dog in the dog house by a seat, a passenger train on the train track"
    assert names(text, matcher) == ["dog", "dog", "chair", "train"]
    assert names("a seat by the toilet", matcher) == ["toilet"]
    with pytest.raises(ProbeError, match="each object must have one line, got 'dog' again in line 2"):
        read_synonyms(saved(tmp_path, "dog\ndog, puppy", "twice.txt"))
    with pytest.raises(ProbeError, match="has none"):
        read_synonyms(saved(tmp_path, "\n", "empty.txt"))
    with pytest.raises(ProbeError, match="readable list of synonyms"):
        read_synonyms(tmp_path / "none.txt")
