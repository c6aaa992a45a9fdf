"""Fair comparisons of models: what a comparison says, what must be equal, and the runs it consists of."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError, model_validator

from kmem.config import Config, ConfigError, load_config
from kmem.config.load import config_folders
from kmem.config.section import Section
from kmem.data.questions import QUESTIONS_SUFFIX
from kmem.model.bank_layout import BankLayout
from kmem.parallel.parameter_counts import count_parameters
from kmem.wording import counted

COMPARISON_FILE = "compare.yaml"
LARGEST_DIFFERENCE = 0.05
Quantity = Literal["total", "active", "non_embedding", "active_non_embedding", "expert_calls", "tokens"]
Tolerance = Annotated[float, Field(ge=0, le=LARGEST_DIFFERENCE)]


class Tree(Section):
    """A tree of clusters of the text's documents: `kmem data cluster`."""

    children: PositiveInt
    """Children of each node."""
    levels: PositiveInt
    """Levels below the root."""


class PreparedText(Section):
    """The text that all contestants are trained and evaluated on. It is made if it is not there."""

    folder: str
    """Prepared folder; with `by_corpus` a folder of prepared folders, one per corpus."""
    corpora: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names that `kmem data corpora` knows."""
    vocab_size: PositiveInt
    """Tokens of the tokenizer trained on them."""
    by_corpus: bool = False
    """Prepare each corpus on its own, FOLDER/NAME, with one tokenizer for all: held-out figures are then also reported
    for each of them."""
    tree: Tree | None = None
    """Cluster the documents into FOLDER/tree, and give all of them their addresses."""

    @property
    def sources(self) -> list[str]:
        """Prepared folders, in the order of the corpora."""
        return [str(Path(self.folder) / name) for name in self.corpora] if self.by_corpus else [self.folder]

    @property
    def tree_folder(self) -> Path:
        """Where the tree is."""
        return Path(self.folder) / "tree"


class Comparison(Section):
    """A question, the models that answer it, and what must be equal between them for the answer to count."""

    title: str
    """What is compared."""
    question: str
    """What the comparison is to find out."""
    data: PreparedText
    """Text of all contestants."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """A seed draws initial weights and order of the text; every contestant runs with each."""
    contestants: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")], str], Field(min_length=2)]
    """Label -> configuration file, beside this one."""
    baseline: str
    """The contestant that differences are taken to."""
    pairs: dict[str, str] = Field(default_factory=dict)
    """Further differences: contestant -> the one that it is compared with besides."""
    equal: Annotated[dict[Quantity, Tolerance], Field(min_length=1)]
    """What must agree with the baseline's, and up to which share of it. Parameters are counted from the modules;
    expert_calls are those of a token in all layers, shared experts included; tokens are those of the whole run."""
    controls: tuple[Literal["off", "shuffled", "single-row"], ...] = ()
    """Further evaluations of contestants with memory: `kmem eval --memory`."""
    bank_controls: tuple[Literal["generic", "none", "blocked"], ...] = ()
    """Further evaluations of contestants with a memory bank: `kmem eval --bank`. One that is trained on generic blocks
    only is evaluated with them, and has no other control than none."""
    questions: bool = False
    """Also ask the questions of the corpus: `kmem eval --questions`."""
    horizons: tuple[PositiveInt, ...] = ()
    """Steps at which the held-out loss during training is reported too; `evaluation.every` must divide them."""

    @model_validator(mode="after")
    def _known(self) -> "Comparison":
        if self.baseline not in self.contestants:
            raise ValueError(f"baseline={self.baseline} is none of the contestants {', '.join(self.contestants)}")
        for one, other in self.pairs.items():
            if one not in self.contestants or other not in self.contestants:
                raise ValueError(
                    f"pairs={{{one}: {other}}} names none of the contestants {', '.join(self.contestants)}"
                )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names one twice")
        if self.questions and len(self.data.corpora) > 1:
            raise ValueError("questions=true is for text of one corpus, which has questions")
        return self

    @property
    def questions_file(self) -> Path | None:
        """Where `kmem data prepare` put the questions of the text."""
        return Path(self.data.folder) / f"{self.data.corpora[0]}{QUESTIONS_SUFFIX}" if self.questions else None


@dataclass(frozen=True)
class Size:
    """What a contestant has and what it uses."""

    total: int
    active: int
    non_embedding: int
    active_non_embedding: int
    embedding: int
    """Embedding, and the head where it is not tied."""
    tables: int
    """Elements in tables."""
    table_read: int
    """Elements of tables that one token reads, of a memory bank one context."""
    expert_calls: int
    """Routed and shared experts that a token runs through, over all layers and iterations."""
    tokens: int
    """Of the whole run, trained or not."""


@dataclass(frozen=True)
class Run:
    """One contestant with one seed."""

    label: str
    seed: int
    source: Path
    """Its configuration file."""
    overrides: tuple[str, ...]
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.folder) / self.config.name


def find_comparisons(name: str | Path) -> list[Path]:
    """Folders with a comparison: `name` itself, or those below it; a path, or a name under `configs/compare`.

    Raises:
        ConfigError: there is none; lists what there is.
    """
    roots = [Path(name), *(folder / "compare" / name for folder in config_folders())]
    for root in roots:
        found = sorted(file.parent for file in root.rglob(COMPARISON_FILE)) if root.is_dir() else []
        if found:
            return found
    known = sorted(
        file.parent.relative_to(folder / "compare").as_posix()
        for folder in config_folders()
        for file in folder.rglob(COMPARISON_FILE)
    )
    raise ConfigError(f"{name}: no folder with a {COMPARISON_FILE}; there are: {', '.join(known) or 'none'}")


def load_comparison(folder: Path) -> Comparison:
    """Read and check a folder's compare.yaml.

    Raises:
        ConfigError: names the file and the field.
    """
    path = folder / COMPARISON_FILE
    try:
        return Comparison.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"{path}: {where + ': ' if where else ''}{problem['msg']}") from None


def plan(
    comparison: Comparison, folder: Path, out: Path, seeds: Sequence[int], overrides: Sequence[str] = ()
) -> list[Run]:
    """All runs, seed after seed, so that an unfinished comparison has whole seeds.

    Raises:
        ConfigError: a contestant's configuration is wrong, or trains on other text than the comparison's.
    """
    runs = []
    for seed in seeds:
        for label, file in comparison.contestants.items():
            own = (
                *overrides,
                f"folder={out}",
                f"name={label}-seed{seed}",
                f"train.init_seed={seed}",
                f"data.seed={seed}",
            )
            config = load_config(folder / file, own)
            read = [source.path for source in config.data.sources]
            if read != comparison.data.sources:
                raise ConfigError(
                    f"{folder / file}: data.sources: {', '.join(read)}, but the comparison is on "
                    f"{', '.join(comparison.data.sources)} (data of {COMPARISON_FILE})"
                )
            every = config.evaluation.every
            for step in comparison.horizons:
                if step > config.train.steps or (step != config.train.steps and (every is None or step % every)):
                    raise ConfigError(
                        f"{folder / file}: evaluation.every: {every}, but step {step} is to be reported "
                        f"(horizons of {COMPARISON_FILE}) of {config.train.steps}"
                    )
            runs.append(Run(label, seed, folder / file, own, config))
    return runs


def measure(config: Config) -> Size:
    """Count a contestant."""
    counts, model = count_parameters(config.model), config.model
    calls = 0
    if model.moe is not None:
        moe, chain = model.moe, model.moe.chain
        passes = 1 if chain is None else chain.iterations
        shared_passes = 1 if chain is None or chain.shared_experts == "once" else passes
        layers = model.num_layers - moe.first_dense_layers
        calls = layers * (passes * moe.top_k + shared_passes * moe.num_shared_experts)
    read = 0
    if model.engram is not None:
        engram = model.engram
        assert engram.orders is not None
        assert engram.heads is not None
        assert engram.row_dim is not None
        read += len(engram.layers) * len(engram.orders) * engram.heads * engram.row_dim
    if model.bank is not None:
        read += BankLayout.of(model.shape).fetched_values
    return Size(
        total=counts.total,
        active=counts.active,
        non_embedding=counts.non_embedding,
        active_non_embedding=counts.active_non_embedding,
        embedding=counts.embedding,
        tables=counts.tables,
        table_read=read,
        expert_calls=calls,
        tokens=config.train.steps * config.train.global_batch_size * config.data.sequence_length,
    )


def check_fairness(comparison: Comparison, sizes: dict[str, Size]) -> None:
    """Compare every contestant with the baseline.

    Raises:
        ConfigError: lists each quantity that differs by more than its tolerance, with the numbers.
    """
    base = asdict(sizes[comparison.baseline])
    problems = []
    for label, size in sizes.items():
        for quantity, tolerance in comparison.equal.items():
            found, wanted = asdict(size)[quantity], base[quantity]
            difference = found / wanted - 1 if wanted else float(bool(found))
            if abs(difference) > tolerance:
                problems.append(
                    f"{label}: {quantity} is {found:,}, {difference:+.2%} of the {wanted:,} of {comparison.baseline}; "
                    f"at most {tolerance:.2%} is fair"
                )
    if problems:
        raise ConfigError("the contestants are not equal:\n" + "\n".join(problems))


def check_folders(runs: Sequence[Run]) -> None:
    """Refuse folders that hold runs of other configurations: their figures would not belong together.

    Raises:
        ConfigError: names the run and the first field that differs.
    """
    for run in runs:
        saved = run.folder / "config.yaml"
        if saved.is_file():
            here, there = (config.model_dump(mode="json") for config in (run.config, load_config(saved)))
            difference = _first_difference(there, here, "")
            if difference is not None:
                raise ConfigError(
                    f"{run.folder}: trained with another configuration, {difference}; name another folder with --out "
                    "or remove this one"
                )


def _first_difference(there: Any, here: Any, field: str) -> str | None:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in [*there, *(name for name in here if name not in there)]:
            found = _first_difference(there.get(name), here.get(name), f"{field}.{name}" if field else name)
            if found is not None:
                return found
        return None
    return None if there == here else f"{field}={there} instead of {here}"


def ensure_data(data: PreparedText, questions: Path | None = None) -> None:
    """Write the corpora, prepare and cluster them, as far as that has not been done.

    Args:
        questions: a file that must then be there.

    Raises:
        ConfigError: the tree that is there has another form, or there are no questions.
    """
    from kmem.corpora.catalogue import extract_corpora
    from kmem.corpora.packages import default_cache
    from kmem.data.manifest import MANIFEST_NAME
    from kmem.data.prepare import Preparation, prepare

    folder = Path(data.folder)
    missing = [Path(source) for source in data.sources if not (Path(source) / MANIFEST_NAME).is_file()]
    if missing:
        print(f"preparing {folder} from {', '.join(data.corpora)}", flush=True)
        text = folder.with_name(f"{folder.name}-text")
        extract_corpora(data.corpora, text, default_cache())
        files = [text / f"{name}.jsonl" for name in data.corpora]
        # The tokenizer is that of all corpora together, which are prepared for its sake where each has its own folder.
        whole = text / "all" if data.by_corpus else folder
        if not (whole / MANIFEST_NAME).is_file():  # of a call that was cut short
            prepare(Preparation(files, whole, vocab_size=data.vocab_size))
        for source in missing if data.by_corpus else ():
            file = text / f"{source.name}.jsonl"
            prepare(Preparation([file], source, tokenizer=whole / "tokenizer"))
        shutil.rmtree(text)
    if questions is not None and not questions.is_file():
        raise ConfigError(
            f"{COMPARISON_FILE}: questions: {questions} is not there; kmem data prepare writes it for a corpus with "
            f"questions: remove {folder} if an older kmem prepared it"
        )
    if data.tree is not None:
        _ensure_tree(data, data.tree)


def _ensure_tree(data: PreparedText, tree: Tree) -> None:
    from kmem.clustering.building import TreeRequest, make_tree
    from kmem.data.bank_addresses import stored_tree
    from kmem.model.bank_tree import read_tree_record

    sources = [Path(source) for source in data.sources]
    if (data.tree_folder / "tree.json").is_file():
        record = read_tree_record(data.tree_folder)
        if (record["children"], record["levels"]) != (tree.children, tree.levels):
            raise ConfigError(
                f"{data.tree_folder}: has {counted(record['levels'], 'level')} of {record['children']} children, and "
                f"{COMPARISON_FILE} asks for {tree.levels} of {tree.children}; name another data.folder"
            )
        if all(stored_tree(source) == record["fingerprint"] for source in sources):
            return
    print(f"clustering the documents of {data.folder}", flush=True)
    make_tree(TreeRequest(sources, data.tree_folder, tree.children, tree.levels, embedder="tfidf", force=True))
