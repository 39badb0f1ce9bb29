"""Words for the 80 COCO objects (:func:`coco_matcher`), and a reader for somebody else's list.

This table was written for Headscope. It is not the list that published CHAIR numbers were made with, so its numbers stand
beside those of other methods measured here, not beside printed ones: for that, read the original's ``synonyms.txt`` with
:func:`read_synonyms`, and give :func:`coco_matcher` what comes out, with :data:`CHAIR_IGNORE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from probes.mentions import WordMatcher
from probes.samples import ProbeError

# A form is here if a describer of a photograph would hardly mean anything else by it. So "glass", "plate", "screen", "net"
# and "bat" are not, and "bike" is a bicycle: who means the other one says motorbike.
COCO_WORDS: dict[str, tuple[str, ...]] = {
    "person": (
        "people", "man", "woman", "boy", "girl", "kid", "child", "baby", "toddler", "infant", "teenager", "teen", "youth",
        "adult", "lady", "gentleman", "guy", "someone", "somebody", "mother", "father", "mom",
        "dad", "parent", "son", "daughter", "brother", "sister", "grandmother", "grandfather", "husband", "wife",
        "family", "friend", "crowd", "pedestrian", "passenger", "driver", "rider", "cyclist", "bicyclist", "biker",
        "motorcyclist", "skier", "snowboarder", "skater", "skateboarder", "surfer", "swimmer", "runner", "jogger", "hiker",
        "player", "athlete", "batter", "pitcher", "catcher", "umpire", "referee", "fielder", "goalkeeper", "teammate",
        "spectator", "audience", "onlooker", "bystander", "tourist", "traveler", "traveller", "visitor", "customer", "shopper",
        "vendor", "worker", "employee", "waiter", "waitress", "chef", "baker", "bartender", "farmer", "fisherman", "fireman",
        "firefighter", "policeman", "policewoman", "cop", "officer", "soldier", "guard", "doctor", "nurse",
        "teacher", "student", "photographer", "musician", "businessman", "businesswoman", "bride", "groom", "cowboy", "clown",
        "bus driver", "train driver", "taxi driver", "truck driver", "car driver", "dog walker", "horse rider", "bike rider",
    ),
    "bicycle": ("bike", "pushbike"),
    "car": (
        "automobile", "sedan", "hatchback", "minivan", "suv", "jeep", "taxi", "taxicab", "cab", "limousine", "limo",
        "convertible", "station wagon", "police car", "sports car", "race car", "passenger car",
    ),
    "motorcycle": ("motorbike", "motor bike", "motor cycle", "scooter", "moped", "dirt bike", "vespa"),
    "airplane": (
        "aeroplane", "air plane", "plane", "aircraft", "jet", "airliner", "jetliner", "jumbo jet", "biplane", "seaplane", "jetplane",
        "fighter jet", "passenger jet", "passenger plane", "passenger airplane", "passenger aircraft",
    ),
    "bus": ("minibus", "school bus", "double decker", "double decker bus", "passenger bus", "trolleybus"),
    "train": (
        "locomotive", "steam engine", "subway train", "passenger train", "freight train", "tram", "streetcar", "monorail", "railcar",
        "train car", "train engine", "railway car", "rail car",
    ),
    "truck": ("lorry", "pickup", "pickup truck", "pick up truck", "fire truck", "firetruck", "fire engine", "semi truck", "tow truck",
              "garbage truck", "dump truck", "semi trailer", "tractor trailer"),
    "boat": (
        "ship", "sailboat", "sail boat", "rowboat", "row boat", "motorboat", "speedboat", "ferry", "ferryboat", "yacht", "canoe", "kayak",
        "raft", "dinghy", "gondola", "barge", "vessel", "fishing boat", "tugboat", "catamaran",
    ),
    "traffic light": ("traffic signal", "stoplight", "stop light", "street signal", "trafficlight"),
    "fire hydrant": ("hydrant", "fireplug", "fire plug"),
    "stop sign": ("stopsign",),
    "parking meter": (),
    "bench": ("pew", "park bench"),
    "bird": (
        "pigeon", "seagull", "gull", "duck", "duckling", "goose", "swan", "parrot", "owl", "eagle", "hawk", "falcon", "crow",
        "raven", "sparrow", "robin", "finch", "pelican", "penguin", "flamingo", "ostrich", "peacock", "chick", "hen",
        "rooster", "hummingbird", "heron", "stork", "parakeet", "cockatoo", "woodpecker",
    ),
    "cat": ("kitten", "kitty", "feline", "tabby"),
    "dog": ("puppy", "pup", "doggy", "doggie", "canine", "poodle", "labrador", "terrier", "bulldog", "dachshund", "chihuahua", "corgi",
            "beagle", "pug", "dalmatian", "golden retriever", "german shepherd", "greyhound"),
    "horse": ("pony", "foal", "colt", "mare", "stallion", ),
    "sheep": ("lamb", "ewe"),
    "cow": ("cattle", "bull", "calf", "ox", "heifer", ),
    "elephant": (),
    "bear": ("polar bear", "grizzly", "grizzly bear", "panda", "panda bear", "bear cub"),
    "zebra": (),
    "giraffe": (),
    "backpack": ("back pack", "rucksack", "knapsack", "book bag", "bookbag"),
    "umbrella": ("parasol",),
    "handbag": ("hand bag", "purse", "shoulder bag"),
    "tie": ("necktie", "neck tie", "bow tie", "bowtie"),
    "suitcase": ("suit case", "luggage", "baggage", "piece of luggage", "pieces of luggage"),
    "frisbee": ("flying disc", "flying disk"),
    "skis": ("ski",),
    "snowboard": ("snow board",),
    "sports ball": ("ball", "soccer ball", "tennis ball", "beach ball"),
    "kite": (),
    "baseball bat": (),
    "baseball glove": ("baseball mitt", "catcher's mitt", "mitt"),
    "skateboard": ("skate board", "longboard"),
    "surfboard": ("surf board", "boogie board", "bodyboard"),
    "tennis racket": ("tennis racquet", "racket", "racquet"),
    "bottle": ("wine bottle", "water bottle", "beer bottle"),
    "wine glass": ("wineglass", "glass of wine", "glasses of wine", "champagne glass"),
    "cup": ("mug", "teacup", "tea cup", "coffee cup", "coffee mug"),
    "fork": (),
    "knife": ("butter knife", "pocketknife"),
    "spoon": ("teaspoon", "tablespoon", "ladle"),
    "bowl": (),
    "banana": (),
    "apple": (),
    "sandwich": ("burger", "hamburger", "cheeseburger", "sub sandwich", "grilled cheese", "panini"),
    "orange": ("tangerine", "clementine", "mandarin"),
    "broccoli": ("broccoli floret",),
    "carrot": (),
    "hot dog": ("hotdog", "corn dog", "chili dog"),
    "pizza": ("pizza pie", "slice of pizza", "slices of pizza"),
    "donut": ("doughnut",),
    "cake": ("cupcake", "cheesecake", "birthday cake", "wedding cake"),
    "chair": (
        "seat", "stool", "armchair", "recliner", "rocking chair", "lawn chair", "folding chair", "deck chair", "highchair",
        "high chair",
    ),
    "couch": ("sofa", "loveseat", "love seat", "settee"),
    "potted plant": ("houseplant", "house plant", "plant in a pot", "pot plant", "flower pot", "flowerpot"),
    "bed": ("bunk bed", "bunk"),
    "dining table": ("table", "desk", "coffee table", "kitchen table", "end table", "side table", "tabletop", "picnic table"),
    "toilet": ("toilet seat", "toilet bowl", "urinal", "commode"),
    "tv": ("television", "television set", "tv set", "flat screen tv", "flat screen television", "television screen",
           "tv screen"),
    "laptop": ("laptop computer", "notebook computer", "macbook"),
    "mouse": ("computer mouse",),
    "remote": ("remote control", "remote controller", "tv remote", "wii remote", "game controller"),
    "keyboard": ("computer keyboard",),
    "cell phone": ("cellphone", "mobile phone", "phone", "smartphone", "smart phone", "iphone"),
    "microwave": ("microwave oven",),
    "oven": ("stove", "stovetop", "stove top", "stove top oven", "cooktop"),
    "toaster": (),
    "sink": ("washbasin", "wash basin"),
    "refrigerator": ("fridge", "freezer"),
    "book": ("textbook", "paperback", "hardcover"),
    "clock": ("clock face", "wall clock", "alarm clock"),
    "vase": (),
    "scissors": ("scissor", "shears"),
    "teddy bear": ("teddy", "stuffed bear"),
    "hair drier": ("hair dryer", "hairdryer", "hairdrier", "blow dryer", "blow drier"),
    "toothbrush": ("tooth brush",),
}  # fmt: skip

COCO_IGNORE: tuple[str, ...] = (
    "home plate", "train track", "train station", "train platform", "bus stop", "bus station", "bus shelter", "car park",
    "toilet paper", "table cloth", "bed of", "ski lift", "ski slope", "ski resort", "ski pole", "ski boot", "ski jacket",
    "ski goggles", "ski mask", "chair lift", "book shelf", "bottle cap", "oven mitt", "ball game", "ball field", "ball park",
    "boat house", "boat dock", "cake stand", "dog house", "bird house", "orange juice", "apple juice", "apple pie",
    "banana bread",
)  # fmt: skip
"""Compounds with an object's word that are not the object."""

CHAIR_IGNORE: tuple[str, ...] = ("home plate", "train track")
"""What the original CHAIR ignores."""

ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
COMPOUNDS = {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}


def coco_matcher(
    words: Mapping[str, Sequence[str]] = COCO_WORDS, *, ignore: Sequence[str] = COCO_IGNORE
) -> WordMatcher:
    """The matcher of the 80 COCO objects.

    With CHAIR's own exceptions: a "baby elephant" or "adult dog" is no person, a "passenger jet" no passenger, a "home plate"
    nothing, and a "seat" no chair in a caption with a toilet.

    Args:
        words: this table, or one of :func:`read_synonyms`. Forms added for the exceptions never take one of its own.
        ignore: compounds that name nothing; :data:`CHAIR_IGNORE` with the original's words.
    """
    owner = {form.casefold(): name for name, forms in words.items() for form in (name, *forms)}
    names = {name: list(forms) for name, forms in words.items()}
    added = {compound: owner[word] for compound, word in COMPOUNDS.items() if word in owner}
    for animal in (a for a in ANIMALS if a in names):
        added |= {f"{age} {form}": animal for age in ("baby", "adult") for form in (animal, *words[animal])}
    for form, name in added.items():
        if form.casefold() not in owner:
            names[name].append(form)
    rule = {"seat": "toilet"} if "seat" in owner and "toilet" in names else {}
    return WordMatcher(names, ignore=[form for form in ignore if form not in owner], unless=rule)


def read_synonyms(path: str | Path) -> dict[str, tuple[str, ...]]:
    """A list in CHAIR's format: one object a line, its name first, then its synonyms, separated by commas.

    Raises:
        ProbeError: no such file, or no objects in it, an object that comes twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"path must be a readable list of synonyms, got {str(path)!r}: {error}") from error
    table: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, 1):
        forms = [form.strip() for form in line.split(",") if form.strip()]
        if not forms:
            continue
        if forms[0] in table:
            raise ProbeError(f"each object must have one line, got {forms[0]!r} again in line {number} of {path}")
        table[forms[0]] = tuple(forms[1:])
    if not table:
        raise ProbeError(f"path must be a list of synonyms, one object a line; {str(path)!r} has none")
    return table
