"""The bank of a model that generates or scores: the contexts of its sequences, and the blocks fetched for them. Ships
beside exported weights.

Rows read from files are held until other contexts are fetched. Then only the rows that are not held yet are read: if
the topic changes below a cluster of level 1, the row of that cluster stays.

Several threads may use one model at once. Settings, fetched contexts included, belong to the model, so all threads
share them. A session (one forward pass, or one `generate` with all its forward passes) keeps the settings with which it
began, and holds the rows that it uses. So concurrent sessions give the same results as sessions run one after another.
"""

import copy
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bank_blocks import BankInput
from .bank_contexts import cluster_paths
from .bank_fetched import distinct_rows, inputs_of_blocks, without_blocks
from .bank_layout import MISSING, BankLayout
from .bank_router import Context, ContextRouter
from .bank_tree import ClusterPath
from .export_tables import RowSource

# Shape letters: B sequences or contexts, T tokens, n fetched contexts, U distinct rows, V values of a row.

BANK_CONTROLS = ("fetched", "generic", "none")
"""What a bank gives all contexts: the blocks of their clusters, the generic blocks, or nothing."""


class LevelFetch(NamedTuple):
    """The cost of a fetch on one level."""

    rows: int
    """Distinct clusters of the contexts."""
    read: int
    """Clusters whose rows were not held yet and had to be read."""
    bytes: int
    """Bytes read."""
    seconds: float
    """Time to read the rows and move them to the model's device."""


@dataclass(frozen=True)
class Fetch:
    """The result of `fetch`."""

    leaves: Tensor
    """int64 [B], the leaf of each context."""
    levels: Mapping[int, LevelFetch]
    route_seconds: float = 0.0
    """Time to embed the contexts and descend the tree."""

    @property
    def bytes(self) -> int:
        """Bytes read on all levels."""
        return sum(level.bytes for level in self.levels.values())

    @property
    def seconds(self) -> float:
        """Time of the whole fetch, routing included."""
        return self.route_seconds + sum(level.seconds for level in self.levels.values())


class Rows(NamedTuple):
    """Rows held for one level; never modified, since several sessions may share them."""

    ids: Tensor
    """int64 [U], ascending, on the host."""
    values: Tensor
    """[U, V]."""

    def alike(self, like: Tensor) -> bool:
        """Whether the rows have the dtype and device of a tensor."""
        return (self.values.dtype, self.values.device) == (like.dtype, like.device)


@dataclass(frozen=True)
class Controls:
    """The settings of a bank. They are replaced, never modified, so a session keeps the settings with which it
    began."""

    control: str = "fetched"
    """One of BANK_CONTROLS."""
    levels: tuple[int, ...] | None = None
    """Levels that are on; None: all."""
    blocked: tuple[ClusterPath, ...] = ()
    """Clusters that the look-up of a leaf may not enter; it takes the next nearest instead."""
    leaves: Tensor | None = None
    """int64 [n], leaves of the contexts given to `fetch`; None: none are fetched."""
    fetched_levels: tuple[int, ...] | None = None
    """Levels given to that `fetch`; None: none were given."""

    @property
    def levels_on(self) -> tuple[int, ...] | None:
        """The levels given to `fetch` if it got any, otherwise `levels`."""
        return self.levels if self.fetched_levels is None else self.fetched_levels


class InferenceBank:
    """The bank of a model, and the settings and held rows of its sequences.

    A forward pass takes its addresses from the first of these that exists: its own argument; the leaves of `fetch`,
    until `forget`; the leaves with which the key-value cache began; the prompt of the running generation; its own
    tokens.

    Threads may not compute on separate CUDA streams: they share fetched rows, and nothing synchronises the streams.
    """

    def __init__(self, layout: BankLayout, sources: dict[int, RowSource] | None = None) -> None:
        self.layout = layout
        self.sources = {} if sources is None else sources
        """Level -> function that reads its rows. May be filled later."""
        self.router: ContextRouter | Callable[[], ContextRouter] | None = None
        """The router, or a function that loads it when it is first needed."""
        self._controls = Controls()
        self._begin()

    def _begin(self) -> None:
        self._loaded: ContextRouter | None = None
        self._held: dict[int, Rows] = {}
        self._setting, self._sharing = threading.RLock(), threading.RLock()  # taken in this order
        self._thread = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> "InferenceBank":
        """An independent bank that shares the tree and its embedder."""
        copied = memo[id(self)] = InferenceBank(self.layout, copy.deepcopy(self.sources, memo))
        copied.router, copied._loaded, copied._controls = self.router, self._loaded, self._controls
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """State for another process, which loads the tree and the rows from their files."""
        return {name: vars(self)[name] for name in ("layout", "sources", "router", "_controls")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @property
    def controls(self) -> Controls:
        """The current settings; in a thread that generates, the settings of its generation."""
        running = self._running()
        return running[-1].controls if running else self._controls

    @property
    def control(self) -> str:
        return self.controls.control

    def choose(self, control: str, levels: Iterable[int] | None) -> None:
        """Choose what all contexts are given.

        Raises:
            ValueError: the bank has no such control or level, or no generic blocks.
        """
        if control not in BANK_CONTROLS:
            raise ValueError(f"bank_control={control!r}: choose one of {', '.join(BANK_CONTROLS)}")
        if control == "generic" and not self.layout.generic:
            raise ValueError(
                "this bank has no generic blocks: model.bank.generic.probability was 0 when it was trained"
            )
        self._set(control=control, levels=self._checked(levels))

    def choose_control(self, control: str) -> None:
        """As `choose`, without changing the levels."""
        with self._setting:
            self.choose(control, self.controls.levels)

    def choose_levels(self, levels: Iterable[int] | None) -> None:
        """As `choose`, without changing the control."""
        with self._setting:
            self.choose(self.control, levels)

    def fetch(
        self,
        contexts: Sequence[Context] | None,
        leaves: Tensor | None,
        levels: Iterable[int] | None,
        blocked: Iterable[ClusterPath | str] | None,
        like: Tensor,
    ) -> Fetch:
        """Fetch the blocks of contexts, or of leaves, and use them until `forget`; `like` has the model's dtype and
        device."""
        with self._setting:
            controls = self.controls
            if controls.control != "fetched":
                raise ValueError(f"bank_control={controls.control!r} fetches nothing; set it to 'fetched' first")
            if (contexts is None) == (leaves is None):
                raise ValueError("give either contexts or addresses to fetch for")
            given = leaves if contexts is None else contexts
            assert given is not None
            if not len(given):
                raise ValueError("no contexts to fetch for; to drop the fetched contexts, call forget()")
            chosen = controls.levels if levels is None else self._checked(levels)
            paths = controls.blocked if blocked is None else cluster_paths(blocked)
            began = time.perf_counter()
            if leaves is None:
                assert contexts is not None
                leaves = self.loaded_router().leaves(contexts, paths)
            elif paths:
                leaves = self.loaded_router().tree.detour(leaves, paths)
            routed = time.perf_counter() - began
            ids = self.layout.row_ids(leaves, levels=chosen)
            with self._sharing:
                self._held = {level: rows for level, rows in self._held.items() if level in ids}
                figures = {
                    level: self.read(level, distinct_rows(level_ids)[0], like)[1] for level, level_ids in ids.items()
                }
            self._set(leaves=leaves, fetched_levels=None if levels is None else chosen)
        return Fetch(leaves, figures, routed)

    def forget(self) -> None:
        """Drop the fetched contexts and the held rows."""
        self._set(leaves=None, fetched_levels=None)
        with self._sharing:
            self._held = {}

    def route(self, contexts: Sequence[Context], blocked: Iterable[ClusterPath | str] | None = None) -> Tensor:
        """The leaf of each context, int64 [B].

        Args:
            blocked: clusters that may not be used; default: the clusters set by `block`.
        """
        paths = self.controls.blocked if blocked is None else cluster_paths(blocked)
        return self.loaded_router().leaves(contexts, paths)

    def block(self, paths: Iterable[ClusterPath | str] | None) -> None:
        """Set the clusters that no context may use; None or an empty list allows all.

        Raises:
            ValueError: a cluster does not exist, no cluster would be left, or the model has no tree.
        """
        blocked = cluster_paths(() if paths is None else paths)
        if blocked:
            self.loaded_router().tree.check_blocked(blocked)
        self._set(blocked=blocked)

    def session(self) -> "InferenceSession":
        """The session of a forward pass: the generation that runs in this thread, or a new one with the current
        settings."""
        running = self._running()
        return running[-1] if running else InferenceSession(self, self._controls)

    @contextmanager
    def generation(self, prompt: Sequence[Context] | None) -> Iterator[None]:
        """Within it, all forward passes of this thread are one session. `prompt` gives its contexts, unless a source
        with priority exists (see the class docstring)."""
        running = self._running()
        running.append(InferenceSession(self, self.controls, prompt))
        try:
            yield
        finally:
            running.pop()

    def loaded_router(self) -> ContextRouter:
        """The tree and its embedder.

        Raises:
            ValueError: the model has no tree, or not the tree that the bank was trained with.
        """
        with self._sharing:
            if self.router is None:
                raise ValueError(
                    "this model has no cluster tree: load an exported folder with from_pretrained, or give addresses"
                )
            if isinstance(self.router, ContextRouter):
                return self.router
            if self._loaded is None:
                self._loaded = self.router()
            return self._loaded

    def read(self, level: int, ids: Tensor, like: Tensor) -> tuple[Rows, LevelFetch]:
        """The rows of ascending ids; rows that are not held are read."""
        if level not in self.sources:
            raise ValueError(
                'tables="mmap": the rows of the bank stay in weight files; load the model with from_pretrained'
            )
        source = self.sources[level]
        if isinstance(source, nn.Module):  # parameters may be trained, so their values are not held
            return Rows(ids, source(ids.to(like.device))), LevelFetch(len(ids), 0, 0, 0.0)
        with self._sharing:
            held = self._held.get(level)
            if held is not None and not held.alike(like):
                held = None
            if held is not None and torch.equal(held.ids, ids):
                return held, LevelFetch(len(ids), 0, 0, 0.0)
            began = time.perf_counter()
            with torch.inference_mode(False), torch.no_grad():  # later forward passes in any mode use the held rows
                ids = ids.clone()
                is_held = torch.zeros_like(ids, dtype=torch.bool) if held is None else torch.isin(ids, held.ids)
                read_rows = source(ids[~is_held])
                rows = read_rows.to(like.device, like.dtype)
                if held is not None and bool(is_held.any()):
                    kept = held.values[torch.searchsorted(held.ids, ids[is_held]).to(like.device)]
                    merged = rows.new_empty(len(ids), rows.shape[1])
                    merged[is_held.to(like.device)], merged[~is_held.to(like.device)] = kept, rows
                    rows = merged
            self._held[level] = Rows(ids, rows)
            figures = LevelFetch(len(ids), len(read_rows), read_rows.nbytes, time.perf_counter() - began)
            return self._held[level], figures

    def _running(self) -> list["InferenceSession"]:
        """The running generations of this thread, each nested in the one before."""
        if not hasattr(self._thread, "running"):
            self._thread.running = []
        return self._thread.running

    def _set(self, **changes: Any) -> None:
        """Change settings, for all sessions that begin from now on and for the running ones of this thread."""
        with self._setting:
            self._controls = replace(self._controls, **changes)
            for session in self._running():
                session.controls = replace(session.controls, **changes)

    def _checked(self, levels: Iterable[int] | None) -> tuple[int, ...] | None:
        if levels is None:
            return None
        chosen = tuple(sorted(set(levels)))
        unknown = sorted(set(chosen) - set(self.layout.levels))
        if unknown:
            known = ", ".join(map(str, self.layout.levels))
            raise ValueError(f"level {unknown[0]}: this bank has blocks on levels {known}")
        return chosen


class InferenceSession:
    """One forward pass, or one `generate` with all its forward passes. It keeps its settings and rows, whatever other
    threads do meanwhile."""

    def __init__(self, bank: InferenceBank, controls: Controls, prompt: Sequence[Context] | None = None) -> None:
        self.controls = controls
        self._bank = bank
        self._prompt: Sequence[Context] | Tensor | None = prompt
        self._held: dict[int, Rows] = {}

    def prompt_leaves(self) -> Tensor | None:
        """The leaves of the prompts, int64 [n], looked up once; None without prompts."""
        if self._prompt is not None and not isinstance(self._prompt, Tensor):
            self._prompt = self.route(self._prompt)
        return self._prompt

    def route(self, contexts: Sequence[Context]) -> Tensor:
        """The leaf of each context, int64 [B]."""
        return self._bank.route(contexts, self.controls.blocked)

    def inputs(self, leaves: Tensor | None, batch: int, tokens: int, like: Tensor) -> dict[int, BankInput]:
        """Layer -> the blocks that it reads for the next `tokens` tokens of `batch` sequences.

        Args:
            leaves: int64 [B] or [B, T]; ignored if the control is generic or none.
            like: a tensor of the model's dtype and device.
        """
        layout, controls = self._bank.layout, self.controls
        if controls.control == "none":
            return without_blocks(layout)
        if controls.control == "generic":
            ids = layout.row_ids(torch.full((batch,), MISSING), True, controls.levels_on)
        else:
            assert leaves is not None
            ids = layout.row_ids(leaves.cpu(), levels=controls.levels_on)
        distinct = {level: distinct_rows(level_ids) for level, level_ids in ids.items()}
        rows = {level: self._rows(level, unique, like) for level, (unique, _) in distinct.items()}
        return inputs_of_blocks(layout, rows, {level: places for level, (_, places) in distinct.items()}, tokens)

    def _rows(self, level: int, ids: Tensor, like: Tensor) -> Tensor:
        """Rows [U, V]. A generation holds its own rows: other threads may fetch between its tokens."""
        held = self._held.get(level)
        if held is None or not held.alike(like) or not torch.equal(held.ids, ids):
            held = self._bank.read(level, ids, like)[0]
            if not isinstance(self._bank.sources[level], nn.Module):
                self._held[level] = held
        return held.values
