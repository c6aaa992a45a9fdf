"""Arithmetic word problems with worked solutions, drawn from a seed: every line of the text can be checked.

A problem is a story in several steps, a question, one equation per step, and the answer. Problem n is a function of
(seed, n) alone, so more problems extend a corpus without changing it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROBLEMS = 100_000
SEED = 0

_NAMES = (
    "Ada", "Ali", "Amara", "Ben", "Carla", "Chen", "Daniel", "Elif", "Emma", "Farid", "Grace", "Hana", "Ivan", "Jonas",
    "Kofi", "Lena", "Luis", "Mara", "Mia", "Noah", "Nora", "Omar", "Priya", "Rosa", "Samir", "Sofia", "Tom", "Yuki",
)  # fmt: skip
_THINGS = (
    "apples", "books", "buttons", "candles", "coins", "cookies", "eggs", "flowers", "letters", "marbles", "nails",
    "oranges", "pencils", "photos", "seeds", "shells", "stamps", "stickers", "stones", "tickets",
)  # fmt: skip
_GOODS = ("bags", "balls", "boxes", "brushes", "cups", "hats", "lamps", "maps", "notebooks", "plates", "ropes", "tools")
_HOLDERS = ("baskets", "boxes", "crates", "drawers", "jars", "rows", "shelves", "trays")
_RIDES = ("bus", "ferry", "train", "truck", "van")


@dataclass
class Problem:
    """A story, its question and the equations that answer it."""

    story: list[str] = field(default_factory=list)
    question: str = ""
    equations: list[str] = field(default_factory=list)
    answer: int = 0

    def calculate(self, left: int, operation: str, right: int) -> int:
        """Add one equation and return its result, which is never negative and never a fraction."""
        results = {"+": left + right, "-": left - right, "*": left * right, "/": left // right if right else -1}
        result = results[operation]
        assert result >= 0
        assert operation != "/" or result * right == left
        self.equations.append(f"{left} {operation} {right} = {result}.")
        self.answer = result
        return result

    def __str__(self) -> str:
        return f"{' '.join(self.story)} {self.question}\n{' '.join(self.equations)}\nThe answer is {self.answer}."


def word_problem(number: int, seed: int = SEED) -> str:
    """Problem `number` of a seed, as three lines of text."""
    draw = random.Random(f"{seed} {number}")
    kind = draw.choice((_collection, _collection, _purchase, _journey, _sharing, _comparison))
    return str(kind(draw))


def word_problems(_root: Path) -> Iterator[tuple[str, str]]:
    """(text, source) of each document: problems 0 to PROBLEMS - 1, without the few that repeat an earlier one."""
    seen: set[str] = set()  # a repeated problem could be both trained on and held out
    for number in range(PROBLEMS):
        problem = word_problem(number)
        if problem not in seen:
            seen.add(problem)
            yield problem, f"word problem {number} of seed {SEED}"


def _collection(draw: random.Random) -> Problem:
    """A number of things that grows and shrinks, two to five times."""
    problem = Problem()
    owner, friend = draw.sample(_NAMES, 2)
    things, have = draw.choice(_THINGS), draw.randint(5, 60)
    problem.story.append(f"{owner} has {have} {things}.")
    for _ in range(draw.randint(2, 5)):
        change = draw.randint(2, 40)
        event = draw.choice(("find", "buy", "give", "lose", "double"))
        if (event in ("give", "lose") and change >= have) or (event == "double" and have > 100):
            event = "find"
        if event == "double":
            problem.story.append(f"Then {owner} gets as many {things} again.")
            have = problem.calculate(have, "*", 2)
        elif event in ("find", "buy"):
            problem.story.append(f"Then {owner} {event}s {change} more.")
            have = problem.calculate(have, "+", change)
        else:
            done = f"gives {change} to {friend}" if event == "give" else f"loses {change}"
            problem.story.append(f"Then {owner} {done}.")
            have = problem.calculate(have, "-", change)
    problem.question = f"How many {things} does {owner} have now?"
    return problem


def _purchase(draw: random.Random) -> Problem:
    """Several goods at their prices, and the change."""
    problem, buyer = Problem(), draw.choice(_NAMES)
    total = 0
    for goods in draw.sample(_GOODS, draw.randint(1, 3)):
        count, price = draw.randint(2, 12), draw.randint(2, 25)
        problem.story.append(f"{buyer} buys {count} {goods} at {price} dollars each.")
        cost = problem.calculate(count, "*", price)
        total = cost if not total else problem.calculate(total, "+", cost)
    if draw.random() < 0.5:
        paid = -(-(total + 1) // 50) * 50
        problem.story.append(f"{buyer} pays with {paid} dollars.")
        problem.calculate(paid, "-", total)
        problem.question = f"How many dollars does {buyer} get back?"
    else:
        problem.question = f"How many dollars does {buyer} pay?"
    return problem


def _journey(draw: random.Random) -> Problem:
    """Distances from speeds and times, and the distance that is left."""
    problem, ride = Problem(), draw.choice(_RIDES)
    way = 0
    for leg in range(draw.randint(2, 3)):
        speed, hours = 5 * draw.randint(4, 24), draw.randint(2, 6)
        who = "Then it" if leg else f"A {ride}"
        problem.story.append(f"{who} goes {speed} miles per hour for {hours} hours.")
        part = problem.calculate(speed, "*", hours)
        way = part if not way else problem.calculate(way, "+", part)
    if draw.random() < 0.5:
        whole = way + 5 * draw.randint(1, 60)
        problem.story.append(f"The whole way is {whole} miles.")
        problem.calculate(whole, "-", way)
        problem.question = "How many miles are left?"
    else:
        problem.question = f"How many miles has the {ride} gone?"
    return problem


def _sharing(draw: random.Random) -> Problem:
    """Full containers, some taken out, the rest shared evenly."""
    problem, owner = Problem(), draw.choice(_NAMES)
    things, holders = draw.choice(_THINGS), draw.choice(_HOLDERS)
    friends, each = draw.randint(2, 9), draw.randint(2, 20)
    shared = friends * each
    count = draw.randint(2, 12)
    inside = -(-shared // count) + draw.randint(0, 5)
    problem.story.append(f"{owner} has {count} {holders} with {inside} {things} in each.")
    all_of_them = problem.calculate(count, "*", inside)
    if all_of_them > shared:
        problem.story.append(f"{owner} keeps {all_of_them - shared} {things}.")
        problem.calculate(all_of_them, "-", all_of_them - shared)
    what = "the others" if all_of_them > shared else "them"
    problem.story.append(f"{friends} friends share {what} evenly.")
    problem.calculate(shared, "/", friends)
    problem.question = f"How many {things} does each friend get?"
    return problem


def _comparison(draw: random.Random) -> Problem:
    """Amounts given in terms of one person's amount, and their sum or a difference."""
    problem = Problem()
    first, second, third = draw.sample(_NAMES, 3)
    things, have = draw.choice(_THINGS), draw.randint(6, 50)
    times, fewer = draw.randint(2, 6), draw.randint(2, 30)
    problem.story.append(f"{first} has {have} {things}.")
    problem.story.append(f"{second} has {times} times as many as {first}.")
    more = problem.calculate(have, "*", times)
    fewer = min(fewer, more - 1)
    problem.story.append(f"{third} has {fewer} fewer than {second}.")
    less = problem.calculate(more, "-", fewer)
    if draw.random() < 0.5:
        problem.calculate(problem.calculate(have, "+", more), "+", less)
        problem.question = f"How many {things} do they have together?"
    else:
        (small, poor), (large, rich) = sorted([(have, first), (less, third)], key=lambda amount: amount[0])
        problem.calculate(large, "-", small)
        problem.question = f"How many more {things} does {rich} have than {poor}?"
    return problem
