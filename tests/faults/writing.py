"""Every command that writes: killed at a random moment and begun again, on a full disk, on one that is read-only."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from kmem.data.documents import Reading
from kmem.data.prepare import Preparation, prepare
from kmem.hf.export import export
from tests.clustering.cluster_case import give_addresses, write_tree
from tests.distributed.training_case import small_config
from tests.faults.outcomes import Ran, alone, failed
from tests.hf.banks import BANKS, write_bank_run
from tests.hf.models import MEMORY, NATIVE, TEXT, tokenizer, write_run
from tests.warm_processes import WarmProcess

BANK = {"children": 2, "levels": [4, 2], "anchor": "frozen"}
ROOMY = "size=1g"


@dataclass(frozen=True)
class Writer:
    """A command that writes into WORK, which stands in its words for a folder of its own."""

    name: str
    words: tuple[str, ...]
    begin: Path | None = None
    """What WORK holds before."""

    def fill(self, work: Path) -> None:
        work.mkdir(exist_ok=True)
        if self.begin is not None:
            shutil.copytree(self.begin, work, dirs_exist_ok=True)

    def start(self, work: Path) -> WarmProcess:
        return alone([word.replace("WORK", str(work)) for word in self.words])

    def run(self, work: Path) -> Ran:
        return Ran.of(self.start(work))


@dataclass(frozen=True)
class Undisturbed:
    """What a writer leaves when nothing happens."""

    seconds: float
    bytes: tuple[int, int]
    """What the disk holds before and after."""
    files: dict[str, str]
    """Relative path -> digest; "" for a folder, and for a file that two runs write differently, such as times."""

    @classmethod
    def of(cls, writer: Writer, root: Path) -> "Undisturbed":
        found, seconds, used = [], 0.0, (0, 0)
        for number in range(2):
            work = root / f"undisturbed-{number}"
            with disk(work):
                writer.fill(work)
                before, began = _used(work), time.monotonic()
                ran = writer.run(work)
                seconds, used = time.monotonic() - began, (before, _used(work))
                assert ran.code == 0, ran
                found.append(content(work))
        one, other = found
        assert one.keys() == other.keys(), f"{writer.name} is not the same twice: {sorted(one.keys() ^ other.keys())}"
        return cls(seconds, used, {name: digest if other[name] == digest else "" for name, digest in one.items()})

    def left_in(self, work: Path) -> bool:
        found = content(work)
        return found.keys() == self.files.keys() and all(
            digest in ("", found[name]) for name, digest in self.files.items()
        )


def _used(folder: Path) -> int:
    space = os.statvfs(folder)
    return (space.f_blocks - space.f_bfree) * space.f_frsize


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """A folder of its own, on a disk of its own where mounting is allowed; removed afterwards."""
    folder.mkdir()
    mounted = CAN_MOUNT and _mount("-t", "tmpfs", "-o", ROOMY, "tmpfs", str(folder))
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder)


def _mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0


def can_mount() -> bool:
    """Whether this process may mount a disk."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = shutil.which("mount") is not None and _mount("-t", "tmpfs", "tmpfs", folder)
        if mounted:
            subprocess.run(["umount", folder], check=True)
    return mounted


CAN_MOUNT = can_mount()


def content(folder: Path) -> dict[str, str]:
    """Relative path -> digest of each file, "" of each folder, whatever names the folder itself left aside."""
    return {
        str(path.relative_to(folder)): _digest(path, folder) if path.is_file() else "" for path in folder.rglob("*")
    }


def _digest(path: Path, folder: Path) -> str:
    return hashlib.sha256(path.read_bytes().replace(str(folder).encode(), b"WORK")).hexdigest()


def writers(root: Path, quick: bool = False) -> Iterator[Writer]:
    """Every command that writes. `kmem data corpora` writes what kmem makes itself; packages need an index."""
    bank = write_bank_run(root / "bank", BANKS["ffn"]).run_folder
    yield Writer("bank erase", ("bank", "erase", "--checkpoint", str(bank), "0", "--out", "WORK/out"))
    export(write_run(root / "moe", NATIVE["qwen3_moe"]), root / "exported", say=str)
    yield Writer("import", ("import", "--from", str(root / "exported"), "--out", "WORK/out"))
    if quick:
        return
    yield Writer("corpora", ("data", "corpora", "gazetteer", "--out", "WORK/out"))
    sizes = ("--rows", "1000", "--touched", "100", "--repeats", "1", "--threads", "1")
    yield Writer("bench", ("bench", "rows", *sizes, "--json", "WORK/rows.json"))
    (root / "texts.txt").write_text("\n".join(f"{text} {number}" for number, text in enumerate(TEXT * 60)))
    texts, line = str(root / "texts.txt"), ("--documents", "line")
    preparing = ("data", "prepare", texts, *line, "--vocab-size", "300", "--workers", "2", "--out", "WORK/out")
    yield Writer("prepare", preparing)
    write_run(root / "plain", NATIVE["qwen3"])
    yield Writer("export", ("export", "--checkpoint", str(root / "plain"), "--out", "WORK/out"))
    write_bank_run(root / "other", BANKS["ffn"])
    replacing = ("bank", "replace", "--checkpoint", str(bank), "1", "--from", str(root / "other"))
    yield Writer("bank replace", (*replacing, "--out", "WORK/out"))
    write_run(root / "engram", MEMORY["deepseek"])
    erasing = ("engram", "erase", "--checkpoint", str(root / "engram"), "--text", "the state of the union")
    yield Writer("engram erase", (*erasing, "--out", "WORK/out"))
    yield Writer("engram export", ("export", "--checkpoint", str(root / "engram"), "--out", "WORK/out"))

    def prepared(folder: Path) -> Path:
        reading = Reading(documents="line")
        prepare(Preparation(inputs=[root / "texts.txt"], out=folder, tokenizer=tokenizer(), reading=reading))
        return folder

    prepared(root / "bare" / "data")
    clustering = ("data", "cluster", "--data", "WORK/data", "--out", "WORK/tree", "--children", "2", "--levels", "2")
    yield Writer("cluster", (*clustering, "--embedder", "tfidf", "--workers", "1"), begin=root / "bare")

    data, tree = prepared(root / "data"), write_tree(root / "tree", 2, 2)
    give_addresses(data, tree)
    config = small_config(
        folder="WORK",
        name="out",
        model__vocab_size=512,
        model__num_layers=2,
        data={"sources": [{"path": str(data)}], "sequence_length": 32},
        train__steps=6,
        train__schedule={"kind": "constant"},
        evaluation={"every": 3, "sequences": 4},
        checkpoint={"every": 1, "keep_last": 2},
        tracking={"wandb": "disabled"},
    )

    def training(name: str, model: dict[str, Any], **changes: Any) -> tuple[str, ...]:
        path = root / f"{name.replace(' ', '-')}.yaml"
        changed = {**config, **changes, "model": {**config["model"], **model}}
        path.write_text(yaml.safe_dump(changed))
        return ("train", "--config", str(path), "--set", "folder=WORK")

    engram = {"engram": {"layers": [1], "rows_per_head": 997, "heads": 2, "row_dim": 8}}
    for ranks, model in ((1, {}), (1, engram), (2, engram), (4, engram)):
        name = f"train {'with an engram ' if model else ''}on {ranks}"
        mesh = {"parallel": {"pipeline": max(1, ranks // 2)}}
        store = {"engram": {"store": "mmap"}} if model else {}
        yield Writer(name, (*training(name, model, **mesh, **store), "--nproc", str(ranks)))
    yield _merging(root, training, data, tree)


def _merging(root: Path, training: Callable[..., tuple[str, ...]], data: Path, tree: Path) -> Writer:
    """`kmem bank merge` of two jobs with one frozen anchor."""

    def trained(name: str, model: dict[str, Any], **changes: Any) -> None:
        words = [word.replace("WORK", str(root / "jobs")) for word in training(name, model, **changes)]
        assert Ran.of(alone([*words, f"name={name}", "train.steps=2"])).code == 0

    trained("anchor", {})
    for part in ("0", "1"):
        addresses = {"tree": str(tree), "batching": "leaf", "subtrees": [part]}
        sources = {"sources": [{"path": str(data)}], "sequence_length": 32, "addresses": addresses}
        start = {"checkpoint": {"start": str(root / "jobs" / "anchor")}}
        trained(f"part-{part}", {"bank": BANK}, data=sources, **start)
    parts = [word for part in ("0", "1") for word in ("--from", str(root / "jobs" / f"part-{part}"))]
    return Writer("bank merge", ("bank", "merge", *parts, "--out", "WORK/out"))


def descendants(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for process in found:
        with suppress(FileNotFoundError):
            for thread in Path(f"/proc/{process}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


def killed(writer: Writer, usual: Undisturbed, work: Path, draw: random.Random) -> tuple[str, str]:
    """Killed with all its processes, or alone, at a random moment."""
    seconds, everything = draw.uniform(0, usual.seconds), draw.random() < 0.7
    writer.fill(work)
    process = writer.start(work)
    time.sleep(seconds)
    family = descendants(process.pid)
    for pid in family if everything else family[:1]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    Ran.of(process)
    until = time.monotonic() + 60  # ranks whose launcher is gone save and end
    while any(Path(f"/proc/{pid}").exists() for pid in family) and time.monotonic() < until:
        time.sleep(0.05)
    return f"SIGKILL after {seconds:.2f} s{'' if everything else ', of the first process'}", begun_again(
        writer, usual, work
    )


def full(writer: Writer, usual: Undisturbed, work: Path, draw: random.Random) -> tuple[str, str]:
    """On a disk that has room for a part of what is written."""
    before, after = usual.bytes
    room = draw.randrange(before, after)
    return f"full after {room - before:,} bytes", _on_disk(writer, usual, work, f"size={room}")


def read_only(writer: Writer, usual: Undisturbed, work: Path, draw: random.Random) -> tuple[str, str]:
    """On a disk that is read-only."""
    return "read-only", _on_disk(writer, usual, work, "ro")


def _on_disk(writer: Writer, usual: Undisturbed, work: Path, option: str) -> str:
    writer.fill(work)
    assert _mount("-o", f"remount,{option}", str(work))
    first = writer.run(work)
    if failed(first) or (first.code and str(work) not in first.said):
        return "traceback"
    assert _mount("-o", f"remount,rw,{ROOMY}", str(work))
    again = begun_again(writer, usual, work)
    return "clean" if again == "same" and first.code else again


def begun_again(writer: Writer, usual: Undisturbed, work: Path) -> str:
    """One of OUTCOMES: the command is given again."""
    again = writer.run(work)
    if failed(again):
        return "traceback"
    if usual.left_in(work):
        return "same"  # also where the command says that its result is there already
    return "stuck" if again.code else "silent"


def attacks(root: Path, seed: int, quick: bool = False) -> Iterator[tuple[str, str, str]]:
    """(command, what happened to it, outcome), without end unless `quick`."""
    draw = random.Random(seed)
    made = [(writer, Undisturbed.of(writer, root)) for writer in writers(root, quick)]
    kinds = (killed, killed, full, read_only) if CAN_MOUNT else (killed,)
    for round_number in range(1) if quick else count():
        for writer, usual in draw.sample(made, len(made)):
            work = root / f"attacked-{round_number}"
            with disk(work):
                what, outcome = draw.choice(kinds)(writer, usual, work, draw)
            yield f"{writer.name}, written", what, outcome
