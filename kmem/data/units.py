"""Units: a unit has a bank address of its own and is a document or a window of one."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kmem.config import UserError
from kmem.data.order import offsets_of

Indices = NDArray[np.int64]

LONGER_THAN_ANY = 1 << 40
"""Tokens of the window that stands for a whole document."""


@dataclass(frozen=True)
class Unit:
    """The rule that cuts documents into units."""

    window: int | None = None
    """Tokens per window; None if a unit is a whole document."""

    @classmethod
    def parse(cls, text: str) -> "Unit":
        """Parse `document` or `window:N`.

        Raises:
            UserError: the text is neither.
        """
        kind, _, number = text.partition(":")
        if text == "document":
            return cls()
        if kind == "window" and number.isascii() and number.isdigit() and int(number) > 0:
            return cls(int(number))
        raise UserError(f"--unit {text}: write document, or window:N for windows of N tokens inside documents")

    def __str__(self) -> str:
        return "document" if self.window is None else f"window:{self.window}"


class UnitMap:
    """The units of a split, numbered in document order.

    Windows do not overlap. The rest of a document after its last whole window is a window of its own if it has at least
    half a window's length; otherwise it belongs to the window before. So a window has N/2 to 3N/2 tokens, unless its
    document is shorter.
    """

    def __init__(self, starts: Indices, lengths: Indices, unit: Unit):
        """starts, lengths: [documents] where each document begins in the stream, and its tokens, with its EOS."""
        self._window = unit.window or LONGER_THAN_ANY
        self._document_starts = starts
        counts = np.maximum((lengths + self._window // 2) // self._window, 1)
        self.first: Indices = offsets_of(counts)
        """[documents + 1] the first unit of each document."""
        self.documents = np.repeat(np.arange(len(lengths)), counts)
        nth = np.arange(len(self.documents)) - self.first[self.documents]
        self.starts = starts[self.documents] + nth * self._window
        """[units] where each unit begins in the stream, in tokens."""
        ends = np.where(
            nth + 1 == counts[self.documents], (starts + lengths)[self.documents], self.starts + self._window
        )
        self.lengths = ends - self.starts
        """[units] tokens of each unit."""

    def __len__(self) -> int:
        return int(self.first[-1])

    def of(self, documents: Indices, places: Indices) -> Indices:
        """The unit of each place in the stream, given its document."""
        nth = (places - self._document_starts[documents]) // self._window
        return np.minimum(self.first[documents] + nth, self.first[documents + 1] - 1)

    def continued(self) -> NDArray[np.bool_]:
        """[units] whether the document continues after the unit."""
        ends = np.zeros(len(self), dtype=bool)
        ends[self.first[1:] - 1] = True
        return ~ends
