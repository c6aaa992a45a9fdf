"""The memory bank of a model that generates or scores: which contexts its sequences have, and the blocks that were
fetched for them. Ships beside exported weights.

Rows that lie in files are kept until other contexts are fetched, and of those only what is not there yet is read: where
the topic changes below a cluster of level 1, that cluster's row stays.

Threads may use one model at once. What is set on it, fetched contexts included, is the model's and so all threads'; a
call (a forward pass, or a `generate` with all of its) goes by what was set when it began, and holds the rows that it
uses. So calls compute what they compute one after another.
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
from .bank_fetched import FetchedBlocks, distinct_rows, without_blocks
from .bank_layout import MISSING, BankLayout
from .bank_router import Context, ContextRouter
from .bank_tree import ClusterPath
from .engram_reader import RowSource

BANK_CONTROLS = ("fetched", "generic", "none")
"""What a bank gives all contexts: the blocks of their clusters, the generic blocks, or nothing."""


class LevelFetch(NamedTuple):
    """What fetching did on a level."""

    rows: int
    """Distinct clusters of the contexts."""
    read: int
    """Of these, how many were not there yet."""
    bytes: int
    """That were read."""
    seconds: float
    """For reading, and moving to the model's device."""


@dataclass(frozen=True)
class Fetch:
    """What `fetch` found and read."""

    leaves: Tensor
    """int64 [B], the leaf of each context."""
    levels: Mapping[int, LevelFetch]
    route_seconds: float = 0.0
    """For embedding the contexts and descending the tree."""

    @property
    def bytes(self) -> int:
        return sum(level.bytes for level in self.levels.values())

    @property
    def seconds(self) -> float:
        """Routing included."""
        return self.route_seconds + sum(level.seconds for level in self.levels.values())


class Rows(NamedTuple):
    """Rows of a level that are held; never changed, since several calls may have them."""

    ids: Tensor
    """int64 [U], ascending, on the host."""
    values: Tensor
    """[U, V]."""

    def alike(self, like: Tensor) -> bool:
        """Whether they have the type and device of a tensor."""
        return (self.values.dtype, self.values.device) == (like.dtype, like.device)


@dataclass(frozen=True)
class Controls:
    """What is set on a bank; never changed but replaced, so that a call keeps what it began with."""

    control: str = "fetched"
    """One of BANK_CONTROLS."""
    levels: tuple[int, ...] | None = None
    """Levels that are on; None: all."""
    blocked: tuple[ClusterPath, ...] = ()
    """Clusters that no context may use where its leaf is looked up; the next nearest takes their place."""
    leaves: Tensor | None = None
    """int64 [n] of the contexts that were fetched by hand."""
    fetched_levels: tuple[int, ...] | None = None
    """Levels that were named with them."""

    @property
    def levels_on(self) -> tuple[int, ...] | None:
        """Levels that were named with fetched contexts stay theirs; otherwise those of now count."""
        return self.levels if self.fetched_levels is None else self.fetched_levels


class InferenceBank:
    """The bank of a model, and what its sequences use of it.

    Addresses of a forward pass are, whichever is there first: its own argument; those of `fetch`, until `forget`; those
    that the key-value cache began with; the running generation's prompt; the tokens of the forward pass themselves.

    Threads that compute on CUDA streams of their own are not provided for: rows that one has fetched serve another.
    """

    def __init__(self, layout: BankLayout, sources: Mapping[int, RowSource] | None = None) -> None:
        self.layout = layout
        self.sources = dict(sources or {})
        """Level -> where its rows are read."""
        self.router: ContextRouter | Callable[[], ContextRouter] | None = None
        """Or how to load it when it is first needed."""
        self._controls = Controls()
        self._begin()

    def _begin(self) -> None:
        self._loaded: ContextRouter | None = None
        self._held: dict[int, Rows] = {}
        self._setting, self._sharing = threading.RLock(), threading.RLock()  # taken in this order
        self._thread = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> "InferenceBank":
        """A bank for itself, with the tree and its embedder in common."""
        copied = memo[id(self)] = InferenceBank(self.layout, copy.deepcopy(self.sources, memo))
        copied.router, copied._loaded, copied._controls = self.router, self._loaded, self._controls
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which load the tree from where it lies, and the rows."""
        return {name: vars(self)[name] for name in ("layout", "sources", "router", "_controls")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @property
    def controls(self) -> Controls:
        """What is set; in a thread that generates, for its generation."""
        running = self._running()
        return running[-1].controls if running else self._controls

    @property
    def control(self) -> str:
        return self.controls.control

    @property
    def levels(self) -> tuple[int, ...] | None:
        return self.controls.levels

    @property
    def blocked(self) -> tuple[ClusterPath, ...]:
        return self.controls.blocked

    @property
    def leaves(self) -> Tensor | None:
        return self.controls.leaves

    def choose(self, control: str, levels: Iterable[int] | None) -> None:
        """What all contexts are given.

        Raises:
            ValueError: no such control or level, or generic blocks of a bank without.
        """
        if control not in BANK_CONTROLS:
            raise ValueError(f"bank_control={control!r}: one of {', '.join(BANK_CONTROLS)}")
        if control == "generic" and not self.layout.generic:
            raise ValueError(
                "this bank has no generic blocks: model.bank.generic.probability was 0 when it was trained"
            )
        self._set(control=control, levels=self._checked(levels))

    def choose_control(self, control: str) -> None:
        """As `choose`; levels stay."""
        with self._setting:
            self.choose(control, self.levels)

    def choose_levels(self, levels: Iterable[int] | None) -> None:
        """As `choose`; what contexts are given stays."""
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
        """Fetch for contexts, or for leaves, and keep it until `forget`; `like` has the model's type and device."""
        with self._setting:
            controls = self.controls
            if controls.control != "fetched":
                raise ValueError(f"bank_control={controls.control!r} fetches nothing; set it to 'fetched' first")
            if (contexts is None) == (leaves is None):
                raise ValueError("give either contexts or addresses to fetch for")
            given = leaves if contexts is None else contexts
            assert given is not None
            if not len(given):
                raise ValueError("no contexts to fetch for; to let go of those that were fetched: forget()")
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
                figures = {level: self.read(level, distinct_rows(found)[0], like)[1] for level, found in ids.items()}
            self._set(leaves=leaves, fetched_levels=None if levels is None else chosen)
        return Fetch(leaves, figures, routed)

    def forget(self) -> None:
        """Let go of fetched contexts and held rows."""
        self._set(leaves=None, fetched_levels=None)
        with self._sharing:
            self._held = {}

    def route(self, contexts: Sequence[Context], blocked: Iterable[ClusterPath | str] | None = None) -> Tensor:
        """The leaf of each context, int64 [B].

        Args:
            blocked: clusters that may not be used; default: what is set.
        """
        return self.loaded_router().leaves(contexts, self.blocked if blocked is None else cluster_paths(blocked))

    def block(self, paths: Iterable[ClusterPath | str] | None) -> None:
        """Name the clusters that no context may use; None or nothing: all may be used.

        Raises:
            ValueError: one is not there, or nothing would be left; or there is no tree.
        """
        blocked = cluster_paths(() if paths is None else paths)
        if blocked:
            self.loaded_router().tree.check_blocked(blocked)
        self._set(blocked=blocked)

    def call(self) -> "Call":
        """What a forward pass goes by: the generation that runs in this thread, or what is set."""
        running = self._running()
        return running[-1] if running else Call(self, self._controls)

    @contextmanager
    def generation(self, prompt: Sequence[Context] | None) -> Iterator[None]:
        """All forward passes in it, of this thread, are one call, whose contexts are the prompts where nothing comes
        before them."""
        running = self._running()
        running.append(Call(self, self.controls, prompt))
        try:
            yield
        finally:
            running.pop()

    def inputs(self, leaves: Tensor | None, batch: int, tokens: int, like: Tensor) -> dict[int, BankInput]:
        """As `Call.inputs`, of a call for itself."""
        return self.call().inputs(leaves, batch, tokens, like)

    def loaded_router(self) -> ContextRouter:
        """The tree and its embedder.

        Raises:
            ValueError: none was given, or it is not the one that the bank was trained with.
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
        """Rows of ascending ids, of which those that are not there are read."""
        if level not in self.sources:
            raise ValueError(
                'tables="mmap": the rows of the bank stay in weight files; load the model with from_pretrained'
            )
        source = self.sources[level]
        if isinstance(source, nn.Module):  # parameters, which may be trained: nothing is held
            return Rows(ids, source(ids.to(like.device))), LevelFetch(len(ids), 0, 0, 0.0)
        with self._sharing:
            held = self._held.get(level)
            if held is not None and not held.alike(like):
                held = None
            if held is not None and torch.equal(held.ids, ids):
                return held, LevelFetch(len(ids), 0, 0, 0.0)
            began = time.perf_counter()
            with torch.inference_mode(False), torch.no_grad():  # what is held serves later forwards of any mode
                ids = ids.clone()
                there = torch.zeros_like(ids, dtype=torch.bool) if held is None else torch.isin(ids, held.ids)
                found = source(ids[~there])
                rows = found.to(like.device, like.dtype)
                if held is not None and bool(there.any()):
                    kept = held.values[torch.searchsorted(held.ids, ids[there]).to(like.device)]
                    merged = rows.new_empty(len(ids), rows.shape[1])
                    merged[there.to(like.device)], merged[~there.to(like.device)] = kept, rows
                    rows = merged
            self._held[level] = Rows(ids, rows)
            figures = LevelFetch(len(ids), len(found), found.nbytes, time.perf_counter() - began)
            return self._held[level], figures

    def _running(self) -> list["Call"]:
        """Generations of this thread, each begun in the one before."""
        if not hasattr(self._thread, "running"):
            self._thread.running = []
        return self._thread.running

    def _set(self, **changes: Any) -> None:
        """For calls that begin from now on, and those that run in this thread."""
        with self._setting:
            self._controls = replace(self._controls, **changes)
            for call in self._running():
                call.controls = replace(call.controls, **changes)

    def _checked(self, levels: Iterable[int] | None) -> tuple[int, ...] | None:
        if levels is None:
            return None
        chosen = tuple(sorted(set(levels)))
        unknown = sorted(set(chosen) - set(self.layout.levels))
        if unknown:
            known = ", ".join(map(str, self.layout.levels))
            raise ValueError(f"level {unknown[0]}: this bank has blocks on levels {known}")
        return chosen


class Call:
    """A forward pass, or a `generate` with all of its: what it goes by, whatever other threads do meanwhile."""

    def __init__(self, bank: InferenceBank, controls: Controls, prompt: Sequence[Context] | None = None) -> None:
        self.controls = controls
        self._bank = bank
        self._prompt: Sequence[Context] | Tensor | None = prompt
        self._held: dict[int, Rows] = {}

    def prompt_leaves(self) -> Tensor | None:
        """Leaves of the prompts' contexts, int64 [n], looked up once; None where there are none."""
        if self._prompt is not None and not isinstance(self._prompt, Tensor):
            self._prompt = self.route(self._prompt)
        return self._prompt

    def route(self, contexts: Sequence[Context]) -> Tensor:
        """The leaf of each context, int64 [B]."""
        return self._bank.route(contexts, self.controls.blocked)

    def inputs(self, leaves: Tensor | None, batch: int, tokens: int, like: Tensor) -> dict[int, BankInput]:
        """What the bank of each layer holds for the next `tokens` tokens of `batch` sequences.

        Args:
            leaves: int64 [B] or [B, T]; of no matter where the memory is generic or none.
            like: a tensor of the model's type and device.
        """
        layout, controls = self._bank.layout, self.controls
        if controls.control == "none":
            return without_blocks(layout)
        if controls.control == "generic":
            ids = layout.row_ids(torch.full((batch,), MISSING), True, controls.levels_on)
        else:
            assert leaves is not None
            ids = layout.row_ids(leaves.cpu(), levels=controls.levels_on)
        distinct = {level: distinct_rows(found) for level, found in ids.items()}
        rows = {level: self._rows(level, found, like) for level, (found, _) in distinct.items()}
        return FetchedBlocks(layout, rows, {level: places for level, (_, places) in distinct.items()}).inputs(tokens)

    def _rows(self, level: int, ids: Tensor, like: Tensor) -> Tensor:
        """Rows [U, V]. A generation keeps its own: other threads may fetch between its tokens."""
        held = self._held.get(level)
        if held is None or not held.alike(like) or not torch.equal(held.ids, ids):
            held = self._bank.read(level, ids, like)[0]
            if not isinstance(self._bank.sources[level], nn.Module):
                self._held[level] = held
        return held.values
