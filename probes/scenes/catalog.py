"""What a scene can hold: settings, objects, and how strongly one object brings another along."""

from __future__ import annotations

from dataclasses import dataclass

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Pair:
    """A trigger that brings its partner along.

    Attributes:
        trigger: an object's name.
        partner: the object that it brings.
        prior: P(partner | trigger) in pictures.
        text_prior: the same in texts without a picture. It runs the other way (``1.49 - prior``), so that what a model
            learned from pictures and what it learned from text alone can be told apart.
    """

    trigger: str
    partner: str
    prior: float

    @property
    def text_prior(self) -> float:
        return round(1.49 - self.prior, 2)


@dataclass(frozen=True)
class Setting:
    """A kind of place: what is typical there and how it is painted (RGB in [0, 1]).

    Attributes:
        name: as in "a kitchen".
        pairs: three triggers and their partners.
        others: typical objects that bring nothing along.
        far: colours of the upper part (wall, sky), one of which is drawn.
        near: colours of the lower part (floor, ground).
        clutter: colour of what stands in front of an object that is partly hidden.
    """

    name: str
    pairs: tuple[Pair, ...]
    others: tuple[str, ...]
    far: tuple[Colour, ...]
    near: tuple[Colour, ...]
    clutter: Colour

    @property
    def objects(self) -> tuple[str, ...]:
        """All eight typical objects."""
        return (*(p.trigger for p in self.pairs), *(p.partner for p in self.pairs), *self.others)


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "kitchen",
        (Pair("teapot", "cup", 0.95), Pair("bread", "knife", 0.8), Pair("bowl", "spoon", 0.6)),
        ("egg", "cheese"),
        ((0.93, 0.90, 0.80), (0.80, 0.87, 0.85)), ((0.62, 0.50, 0.38), (0.70, 0.66, 0.62)), (0.45, 0.47, 0.55),
    ),
    Setting(
        "street",
        (Pair("stoplight", "car", 0.99), Pair("bicycle", "helmet", 0.9), Pair("bus", "barrier", 0.5)),
        ("truck", "scooter"),
        ((0.72, 0.80, 0.90), (0.80, 0.76, 0.72)), ((0.42, 0.42, 0.45), (0.55, 0.53, 0.50)), (0.30, 0.34, 0.32),
    ),
    Setting(
        "garden",
        (Pair("tulip", "bee", 0.9), Pair("rabbit", "carrot", 0.7), Pair("ladder", "bucket", 0.5)),
        ("snail", "mushroom"),
        ((0.66, 0.84, 0.95), (0.62, 0.78, 0.55)), ((0.45, 0.66, 0.35), (0.55, 0.48, 0.30)), (0.20, 0.42, 0.20),
    ),
    Setting(
        "desk",
        (Pair("pencil", "ruler", 0.95), Pair("laptop", "phone", 0.8), Pair("book", "clock", 0.6)),
        ("bulb", "envelope"),
        ((0.86, 0.86, 0.90), (0.70, 0.76, 0.84)), ((0.74, 0.58, 0.40), (0.52, 0.40, 0.30)), (0.62, 0.60, 0.52),
    ),
    Setting(
        "beach",
        (Pair("shell", "crab", 0.99), Pair("umbrella", "sandal", 0.9), Pair("boat", "fish", 0.7)),
        ("kite", "coconut"),
        ((0.55, 0.80, 0.95), (0.40, 0.66, 0.80)), ((0.93, 0.85, 0.62), (0.86, 0.76, 0.58)), (0.55, 0.50, 0.40),
    ),
    Setting(
        "party",
        (Pair("cake", "candle", 0.99), Pair("balloon", "gift", 0.8), Pair("guitar", "drum", 0.6)),
        ("crown", "trumpet"),
        ((0.80, 0.66, 0.85), (0.95, 0.80, 0.72)), ((0.50, 0.36, 0.52), (0.66, 0.50, 0.44)), (0.40, 0.26, 0.42),
    ),
)  # fmt: skip

ANYWHERE: tuple[str, ...] = ("dog", "cat", "chair", "hat")
"""Objects that are at home in every setting and in none."""

PICTOGRAMS: dict[str, str] = {
    "teapot": "🫖", "cup": "☕", "bread": "🍞", "knife": "🔪", "bowl": "🥣", "spoon": "🥄", "egg": "🥚", "cheese": "🧀",
    "stoplight": "🚦", "car": "🚗", "bicycle": "🚲", "helmet": "⛑", "bus": "🚌", "barrier": "🚧", "truck": "🚚", "scooter": "🛴",
    "tulip": "🌷", "bee": "🐝", "rabbit": "🐇", "carrot": "🥕", "ladder": "🪜", "bucket": "🪣", "snail": "🐌", "mushroom": "🍄",
    "pencil": "✏", "ruler": "📏", "laptop": "💻", "phone": "📱", "book": "📖", "clock": "⏰", "bulb": "💡", "envelope": "✉",
    "shell": "🐚", "crab": "🦀", "umbrella": "⛱", "sandal": "🩴", "boat": "⛵", "fish": "🐟", "kite": "🪁", "coconut": "🥥",
    "cake": "🎂", "candle": "🕯", "balloon": "🎈", "gift": "🎁", "guitar": "🎸", "drum": "🥁", "crown": "👑", "trumpet": "🎺",
    "dog": "🐕", "cat": "🐈", "chair": "🪑", "hat": "🎩",
}  # fmt: skip
"""The character of Noto Color Emoji that each object is drawn with; the order is that of the atlas and of the classes."""

NAMES: tuple[str, ...] = tuple(PICTOGRAMS)
INDEX: dict[str, int] = {name: number for number, name in enumerate(NAMES)}
BY_SETTING: dict[str, Setting] = {setting.name: setting for setting in SETTINGS}
PAIRS: tuple[Pair, ...] = tuple(pair for setting in SETTINGS for pair in setting.pairs)
AT_HOME: dict[str, frozenset[str]] = {setting.name: frozenset(setting.objects) for setting in SETTINGS}
"""The eight typical objects of every setting."""
BY_TRIGGER: dict[str, Pair] = {pair.trigger: pair for pair in PAIRS}
BY_PARTNER: dict[str, Pair] = {pair.partner: pair for pair in PAIRS}

MATS: dict[str, Colour] = {
    "red": (0.85, 0.20, 0.20), "blue": (0.20, 0.35, 0.85), "green": (0.15, 0.60, 0.25), "yellow": (0.95, 0.85, 0.20),
}  # fmt: skip
"""Colours of the round mat that an object may stand on."""

PLACES: tuple[str, ...] = (
    "top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
"""Names of the nine cells of a scene, row by row."""

IRREGULAR = {"knife": "knives", "bus": "buses", "fish": "fish"}


def plural(name: str) -> str:
    """The plural of an object's name."""
    return IRREGULAR.get(name, f"{name}s")


def with_article(name: str) -> str:
    """``a cup``, ``an egg``."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
