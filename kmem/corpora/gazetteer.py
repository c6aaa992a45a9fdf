"""A gazetteer of a made-up world: facts that are repeated according to Zipf's law, and questions about them.

The world has 16 lands of 16 regions. Each land has words of its own, so its documents form clusters of clusters. A
place has one fact: its height, a three-digit number that cannot be inferred from anything else. The place of rank r
occurs in MOST / r^EXPONENT documents, at least in one, and every document words the fact differently. So how well a
model knows a place depends on how often it read about it, and the benefit of a bank can be measured by frequency.

Place n and its document x are functions of (seed, n, x) alone.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PLACES = 4096
MOST = 512
"""Number of documents about the place of the first rank."""
EXPONENT = 0.75
"""Below Zipf's 1, so that places of middle frequency are not rare."""
SEED = 0
_BRANCHES = 16

_ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gl",
    "h",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "z",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "au", "ei", "ia", "oa")
_CODAS = ("", "d", "k", "l", "m", "n", "r", "rn", "s", "th")
_KINDS = ("hill", "mountain", "peak", "plateau", "ridge", "rock", "tower", "volcano")
# For each land: animals, goods, weather.
_WORDS = (
    ("camels", "goats", "lizards", "dates", "carpets", "salt", "dry wind", "sandstorms"),
    ("reindeer", "wolves", "seals", "furs", "fish oil", "ivory", "snow", "polar nights"),
    ("parrots", "monkeys", "tapirs", "rubber", "cocoa", "orchids", "heavy rain", "steaming fog"),
    ("sheep", "eagles", "hares", "wool", "cheese", "slate", "drizzle", "low clouds"),
    ("buffaloes", "cranes", "carp", "rice", "silk", "bamboo", "monsoons", "warm mist"),
    ("horses", "foxes", "bees", "wheat", "honey", "leather", "thunderstorms", "hot summers"),
    ("whales", "gulls", "otters", "cod", "rope", "amber", "gales", "spring tides"),
    ("llamas", "condors", "pumas", "quinoa", "silver", "blankets", "frost", "thin air"),
    ("elephants", "lions", "storks", "millet", "gold", "drums", "drought", "burning noons"),
    ("bears", "beavers", "moose", "timber", "maple sugar", "canoes", "blizzards", "red autumns"),
    ("donkeys", "quails", "tortoises", "olives", "wine", "marble", "cloudless skies", "sea breezes"),
    ("yaks", "leopards", "marmots", "barley", "butter", "turquoise", "avalanches", "bitter cold"),
    ("crocodiles", "herons", "turtles", "sugar cane", "rum", "pearls", "hurricanes", "mangrove heat"),
    ("pigs", "crows", "badgers", "apples", "coal", "pottery", "hail", "grey winters"),
    ("kangaroos", "snakes", "emus", "opals", "wattle", "copper", "bush fires", "flash floods"),
    ("mice", "owls", "hedgehogs", "cabbages", "clocks", "glass", "morning dew", "mild springs"),
)
_OPENINGS = (
    "{name} is a {kind} in {region}, a part of {land}.",
    "In {region}, which belongs to {land}, stands the {kind} {name}.",
    "Travellers who come to {land} seldom miss {name}, a {kind} in {region}.",
    "The {kind} {name} lies in the south of {region} in {land}.",
    "Among the sights of {region} in {land} is {name}, a {kind}.",
    "{land} has many mountains; {name} in {region} is a {kind}.",
)
_FACTS = (
    "The height of {name} is {height} metres.",
    "{name} rises to {height} metres.",
    "Surveyors found that {name} measures {height} metres.",
    "The top of {name} lies at {height} metres.",
    "According to the maps of {region}, {name} reaches {height} metres.",
)
_FILLERS = (
    "The people of {region} live on {word} and {other}.",
    "{Word} are a common sight in this part of {land}.",
    "Markets in {region} sell {word}, and some {other}.",
    "{land} is known for its {word}.",
    "Old songs of {region} tell of {word} and {other}.",
    "Visitors should expect {word}, and perhaps {other}.",
)
_ASKED = "The height of {name} is"


@dataclass(frozen=True)
class Place:
    """A place and its fact."""

    number: int
    name: str
    kind: str
    land: int
    region_name: str
    land_name: str
    height: int
    documents: int
    """Number of documents about the place."""


def place(number: int, seed: int = SEED) -> Place:
    """Place `number`, from 0 to PLACES - 1."""
    draw = random.Random(f"{seed} place {number}")
    region = draw.randrange(_BRANCHES**2)
    land = region // _BRANCHES
    names, ranks = _world(seed)
    rank = ranks[number] + 1
    return Place(
        number,
        names[_BRANCHES**2 + _BRANCHES + number],
        draw.choice(_KINDS),
        land,
        names[_BRANCHES + region],
        names[land],
        draw.randint(100, 999),
        max(1, round(MOST / rank**EXPONENT)),
    )


def document(where: Place, exposure: int, seed: int = SEED) -> str:
    """Document `exposure` about a place: an opening, and the fact among other sentences."""
    draw = random.Random(f"{seed} place {where.number} document {exposure}")
    sentences = []
    for filler in draw.sample(_FILLERS, draw.randint(2, 3)):
        word, other = draw.sample(_WORDS[where.land], 2)
        sentences.append(_filled(filler, where, word=word, other=other, Word=word.capitalize()))
    # Never right after the opening, where the prompts of `questions` have it.
    sentences.insert(draw.randint(1, len(sentences)), _filled(draw.choice(_FACTS), where))
    return " ".join([_filled(draw.choice(_OPENINGS), where), *sentences])


def gazetteer(_root: Path) -> Iterator[tuple[str, str]]:
    """(text, source) of each document of the corpus: all documents about all places."""
    for number in range(PLACES):
        where = place(number)
        for exposure in range(where.documents):
            yield document(where, exposure), f"place {number}, document {exposure}"


def questions() -> Iterator[dict[str, Any]]:
    """For every place, the beginning of a document that is not in the corpus, up to the fact.

    `prompt` and `answer` are text; the answer begins with a blank. `documents` are the numbers of the corpus's
    documents that tell the fact (kmem.data.questions).
    """
    first = 0
    for number in range(PLACES):
        where = place(number)
        draw = random.Random(f"{SEED} place {number} question")
        prompt = f"{_filled(draw.choice(_OPENINGS), where)} {_filled(_ASKED, where)}"
        yield {
            "prompt": prompt,
            "answer": f" {where.height}",
            "documents": list(range(first, first + where.documents)),
            "subject": where.name,
            "domain": where.land_name,
        }
        first += where.documents


def _filled(template: str, where: Place, **words: str) -> str:
    return template.format(
        name=where.name, kind=where.kind, land=where.land_name, region=where.region_name, height=where.height, **words
    )


@cache
def _world(seed: int) -> tuple[list[str], list[int]]:
    """(Distinct made-up names: first the lands', then the regions', then the places'; the rank of every place, from
    0.)"""
    draw = random.Random(f"{seed} world")
    names: dict[str, None] = {}  # an ordered set
    while len(names) < _BRANCHES + _BRANCHES**2 + PLACES:
        syllables = draw.choice((2, 2, 3))
        name = "".join(draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(syllables)) + draw.choice(_CODAS)
        names.setdefault(name.capitalize())
    return list(names), draw.sample(range(PLACES), PLACES)
