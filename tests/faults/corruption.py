"""Every file of every kind of folder: a bit flipped, cut short, zeroed, deleted, or swapped with a neighbour."""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kmem.data.documents import Reading
from kmem.data.prepare import Preparation, prepare
from kmem.hf.export import export
from tests.faults.outcomes import Ran, judge, run
from tests.hf.banks import BANKS, write_bank_run
from tests.hf.models import MEMORY, NATIVE, TEXT, tokenizer, write_run


def _flip(path: Path, draw: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    if raw:
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def _truncate(path: Path, draw: random.Random) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: draw.randrange(len(raw) or 1)])


def _zero(path: Path, draw: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def _swap(path: Path, draw: random.Random) -> None:
    other = draw.choice([file for file in path.parent.iterdir() if file.is_file()])
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flip": _flip, "truncate": _truncate, "zero": _zero, "delete": _delete, "swap": _swap,
}  # fmt: skip
IGNORED = ("README.md", ".gitattributes", "LICENSE", "NOTICE", "lock", "model.yaml", "config.yaml")
"""Files that no attacked command reads."""


@dataclass(frozen=True)
class Target:
    """A folder, and a command that reads it."""

    name: str
    folder: Path
    words: tuple[str, ...]
    """With FOLDER in place of the folder."""

    def read(self, folder: Path) -> Ran:
        return run([word.replace("FOLDER", str(folder)) for word in self.words])


def targets(root: Path) -> list[Target]:
    """One folder of every kind."""
    prompt = ("generate", "--prompt", "the", "--max-new-tokens", "6", "--temperature", "0", "--checkpoint", "FOLDER")
    write_run(root / "plain", NATIVE["qwen3"])
    export(write_run(root / "native", NATIVE["qwen3_moe"]), root / "export", say=str)
    export(write_run(root / "engram", MEMORY["deepseek"]), root / "engram-export", say=str, max_shard_bytes=20_000)
    write_bank_run(root / "bank", BANKS["ffn"])
    (root / "texts.txt").write_text("\n".join(f"{text} {number}" for number, text in enumerate(TEXT * 60)))
    prepare(
        Preparation(
            inputs=[root / "texts.txt"], out=root / "data", tokenizer=tokenizer(), reading=Reading(documents="line")
        )
    )
    evaluate = ("eval", "--json", "--checkpoint", str(root / "plain"), "--data", "FOLDER")
    return [
        Target("checkpoint, generate", root / "plain", prompt),
        Target("checkpoint, eval", root / "plain", ("eval", "--json", "--data", str(root / "data"), *prompt[-2:])),
        Target("engram checkpoint, list", root / "engram", ("engram", "list", "--json", "--checkpoint", "FOLDER")),
        Target("bank checkpoint, list", root / "bank", ("bank", "list", "--json", "--checkpoint", "FOLDER")),
        Target("bank checkpoint, generate", root / "bank", prompt),
        Target("export, generate", root / "export", prompt),
        Target("engram export, generate", root / "engram-export", prompt),
        Target("export, verify", root / "export", ("verify", "FOLDER")),
        Target("data, eval", root / "data", evaluate),
        Target("data, verify", root / "data", ("verify", "FOLDER")),
    ]


def attacks(root: Path, seed: int) -> Iterator[tuple[str, str, str]]:
    """(target, what was done to which file, outcome), every file and damage once, in an order drawn from the seed."""
    draw = random.Random(seed)
    made = targets(root)
    unharmed = {target.name: target.read(target.folder) for target in made}
    assert all(ran.code == 0 for ran in unharmed.values()), unharmed
    jobs = [
        (target, path.relative_to(target.folder), damage)
        for target in made
        for path in sorted(target.folder.rglob("*"))
        if path.is_file() and path.name not in IGNORED and path.suffix != ".py"
        for damage in DAMAGES
    ]
    draw.shuffle(jobs)
    for number, (target, file, damage) in enumerate(jobs):
        copy = root / f"attacked-{number}"
        shutil.copytree(target.folder, copy)
        DAMAGES[damage](copy / file, draw)
        attacked = target.read(copy)
        outcome = judge(unharmed[target.name], attacked, str(copy))
        shutil.rmtree(copy)
        yield target.name, f"{damage} {file}", outcome
