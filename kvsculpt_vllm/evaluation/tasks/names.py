"""Names, numbers and identifiers that tasks hide, drawn by a seed."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from itertools import islice

_WORDS = (
    "amber anchor apple arrow autumn badger barrel beacon birch bishop blanket bottle branch bridge bronze bucket "
    "butter button cabin candle canyon carpet castle cherry chimney circle cobalt comet copper coral cotton cradle "
    "crystal curtain daisy desert diamond dolphin dragon eagle ember falcon feather fiddle forest fountain garden "
    "ginger glacier granite hammer harbor hazel helmet honey island ivory jacket jasmine jungle kettle ladder lagoon "
    "lantern laurel lemon lily linen lizard magnet maple marble meadow mirror mitten monkey needle nickel oasis olive "
    "orchid otter oyster paddle palace panther parrot pearl pebble pepper piano pillow pirate planet pocket pumpkin "
    "quartz rabbit raven ribbon river rocket saddle saffron sailor satin shadow silver sparrow spider stable summer "
    "temple thistle thunder tiger timber tulip tunnel turtle valley velvet violin walnut willow window winter zebra"
)

NAMES = _WORDS.split()
"""What things are called."""

_MORE_WORDS = (
    "acorn almond apron basket bell berry bonnet boot bowl broom brush bugle cake camel candy carrot cedar chain "
    "chalk cheese chestnut clay cliff cloak clock cloud clover coin crane crown cup cushion dove drum duck feast "
    "fence fern fig flag flute fox frog gate glass glove goat goose grape harp hawk hen hill horn horse jar jewel "
    "jigsaw kite lake lamb lamp leaf lion log loom mask mast mint moon moss mouse nest peach pen pie pigeon pine "
    "plum pond poppy pot rose salt sand seal shell ship shoe silk snail spoon squirrel star stone swan sword tent "
    "thimble toad tower tractor trunk vase wagon wheel wolf"
)

WORDS = [*(name for name in NAMES if name != "sparrow"), *_MORE_WORDS.split()]
"""Words that can be counted: none is a part of another, so that an answer that holds one says it."""


def different(make: Callable[[], str]) -> Iterator[str]:
    """Draw for ever, and nothing twice."""
    drawn = set[str]()
    while True:
        if (one := make()) not in drawn:
            drawn.add(one)
            yield one


def distinct(make: Callable[[], str], count: int) -> list[str]:
    """Draw until there are `count` different ones."""
    return list(islice(different(make), count))


def number(rng: random.Random) -> str:
    """Seven digits, as RULER's numbers."""
    return str(rng.randrange(10**6, 10**7))


def two_words(rng: random.Random, between: str = "-") -> str:
    """Two of the names as one."""
    return between.join(rng.sample(NAMES, 2))


def place(rng: random.Random) -> str:
    """A town that there is not, so that no model knows of it."""
    return two_words(rng, "").capitalize()


def person(rng: random.Random) -> str:
    """A first and a family name, both made up."""
    first, family = (
        "".join(rng.choice("bdfgklmnprstv") + rng.choice("aeiou") for _ in range(length)).capitalize()
        for length in (2, 3)
    )
    return f"{first} {family}"


def firm(rng: random.Random) -> str:
    """A firm of two partners."""
    return two_words(rng, " & ").title()


def identifier(rng: random.Random) -> str:
    """A version 4 UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
