"""Fair comparisons of models: the comparison file, what must be equal between models, and the planned runs."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from kmem.config import Config, ConfigError, load_config
from kmem.config.load import config_folders
from kmem.config.section import Section
from kmem.data.questions import QUESTIONS_SUFFIX
from kmem.model.memory_kinds import kinds_of, replaces_feed_forward
from kmem.model.parameter_counts import count_parameters
from kmem.wording import counted

COMPARISON_FILE = "compare.yaml"
LARGEST_DIFFERENCE = 0.05
Quantity = Literal["total", "active", "non_embedding", "active_non_embedding", "expert_calls", "tokens"]
Tolerance = Annotated[float, Field(ge=0, le=LARGEST_DIFFERENCE)]


class Tree(Section):
    """A cluster tree of the text's documents, made as by `kmem data cluster`."""

    children: PositiveInt
    """Children of each node."""
    levels: PositiveInt
    """Levels below the root."""


class PreparedText(Section):
    """The text that all contestants are trained and evaluated on. It is prepared if it does not exist."""

    folder: str
    """Prepared folder; with `by_corpus` a folder of prepared folders, one per corpus."""
    corpora: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of corpora that `kmem data corpora` writes."""
    vocab_size: PositiveInt
    """Vocabulary size of the tokenizer that is trained on the corpora."""
    by_corpus: bool = False
    """Prepare each corpus in a folder of its own, FOLDER/NAME, with one tokenizer for all. Held-out figures are then
    also reported per corpus."""
    tree: Tree | None = None
    """Cluster the documents into FOLDER/tree and give all documents their addresses."""

    @property
    def sources(self) -> list[str]:
        """Prepared folders, in the order of the corpora."""
        return [str(Path(self.folder) / name) for name in self.corpora] if self.by_corpus else [self.folder]

    @property
    def tree_folder(self) -> Path:
        """Folder of the tree."""
        return Path(self.folder) / "tree"


class Comparison(Section):
    """A question, the models that answer it, and what must be equal between them for a fair answer."""

    title: str
    """Title of the comparison."""
    question: str
    """The question that the comparison answers."""
    data: PreparedText
    """Text of all contestants."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """A seed decides the initial weights and the order of the text; every contestant runs with every seed."""
    contestants: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")], str], Field(min_length=2)]
    """Label -> configuration file, beside this one."""
    baseline: str
    """The contestant that the others are compared with."""
    pairs: dict[str, str] = Field(default_factory=dict)
    """Further differences: contestant -> another contestant that it is also compared with."""
    equal: Annotated[dict[Quantity, Tolerance], Field(min_length=1)]
    """Quantity that must agree with the baseline's -> tolerance, as a share of the baseline's. Parameters are counted
    from the modules; expert_calls counts one token in all layers, with shared experts; tokens counts the whole run."""
    controls: tuple[Annotated[str, Field(pattern=r"^[a-z_]+=[a-z-]+$")], ...] = ()
    """Further evaluations of contestants that have the memory: `kmem eval --control`. A bank that is trained on generic
    blocks only is evaluated with them, and its only control is none."""
    questions: bool = False
    """Also ask the questions about the corpus: `kmem eval --questions`."""
    horizons: tuple[PositiveInt, ...] = ()
    """Steps at which the held-out loss during training is also reported; multiples of `evaluation.every`."""

    def check(self) -> None:
        if self.baseline not in self.contestants:
            raise ValueError(f"baseline={self.baseline} is not one of the contestants {', '.join(self.contestants)}")
        for one, other in self.pairs.items():
            if one not in self.contestants or other not in self.contestants:
                raise ValueError(
                    f"pairs={{{one}: {other}}} must name two of the contestants {', '.join(self.contestants)}"
                )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names a seed twice")
        if self.questions and len(self.data.corpora) > 1:
            raise ValueError("questions=true needs text of a single corpus that has questions")

    @property
    def questions_file(self) -> Path | None:
        """The file in which `kmem data prepare` stored the questions; None without questions."""
        return Path(self.data.folder) / f"{self.data.corpora[0]}{QUESTIONS_SUFFIX}" if self.questions else None


@dataclass(frozen=True)
class Size:
    """Parameters and costs of a contestant."""

    total: int
    active: int
    non_embedding: int
    active_non_embedding: int
    embedding: int
    """Parameters of the embedding, and of the head if it is not tied."""
    tables: int
    """Elements in tables."""
    table_read: int
    """Elements of tables that one token reads; for a bank, that one context reads."""
    expert_calls: int
    """Routed and shared experts that a token passes, over all layers and iterations."""
    tokens: int
    """Tokens of the whole run, trained or not."""


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
    """Folders with a comparison: `name` itself, or folders below it.

    Args:
        name: a path, or a name under `configs/compare`.

    Raises:
        ConfigError: there is none; lists the known ones.
    """
    roots = [Path(name), *(folder / "compare" / name for folder in config_folders())]
    for root in roots:
        comparisons = sorted(file.parent for file in root.rglob(COMPARISON_FILE)) if root.is_dir() else []
        if comparisons:
            return comparisons
    known = sorted(
        file.parent.relative_to(folder / "compare").as_posix()
        for folder in config_folders()
        for file in folder.rglob(COMPARISON_FILE)
    )
    raise ConfigError(f"{name}: no folder with a {COMPARISON_FILE}; known comparisons: {', '.join(known) or 'none'}")


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
    """All runs, seed by seed, so that an unfinished comparison has complete seeds.

    Raises:
        ConfigError: a contestant's configuration is invalid, or does not train on the comparison's text.
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
            if config.model.vocab_size is None:
                raise ConfigError(
                    f"{folder / file}: model.vocab_size: contestants are counted before their text is prepared; set it "
                    f"to {comparison.data.vocab_size}, the size of the tokenizer"
                )
            if config.train.minutes is not None:
                raise ConfigError(f"{folder / file}: train.minutes: models are compared at equal steps; leave it out")
            every = config.evaluation.every
            for step in comparison.horizons:
                if step > config.train.steps or (step != config.train.steps and (every is None or step % every)):
                    raise ConfigError(
                        f"{folder / file}: evaluation.every: {every}, so step {step} of {config.train.steps} is not "
                        f"evaluated, but horizons of {COMPARISON_FILE} names it"
                    )
            runs.append(Run(label, seed, folder / file, own, config))
    return runs


def measure(config: Config) -> Size:
    """Count a contestant's parameters, expert calls and tokens."""
    counts, model = count_parameters(config.model.shape), config.model
    calls = 0
    if model.moe is not None:
        moe, chain = model.moe, model.moe.chain
        passes = 1 if chain is None else chain.iterations
        shared_passes = 1 if chain is None or chain.shared_experts == "once" else passes
        layers = sum(
            model.shape.has_experts(layer) and not replaces_feed_forward(model.shape, layer)
            for layer in range(model.num_layers)
        )
        calls = layers * (passes * moe.top_k + shared_passes * moe.num_shared_experts)
    counted_parameters = ("total", "active", "non_embedding", "active_non_embedding", "embedding", "tables")
    return Size(
        **{name: getattr(counts, name) for name in counted_parameters},
        table_read=sum(
            kind.fetched_values(model.shape)
            or sum(kind.row_values(model.shape, layer) for layer in kind.layers(model.shape))
            for kind in kinds_of(model.shape)
        ),
        expert_calls=calls,
        tokens=config.train.steps * config.train.global_batch_size * config.data.sequence_length,
    )


def check_fairness(comparison: Comparison, sizes: dict[str, Size]) -> None:
    """Compare every contestant with the baseline.

    Raises:
        ConfigError: lists each quantity that differs by more than its tolerance, with the numbers.
    """
    problems = []
    for label, size in sizes.items():
        for quantity, tolerance in comparison.equal.items():
            own, wanted = getattr(size, quantity), getattr(sizes[comparison.baseline], quantity)
            difference = own / wanted - 1 if wanted else float(bool(own))
            if abs(difference) > tolerance:
                problems.append(
                    f"{label}: {quantity} is {own:,}, {difference:+.2%} from the {wanted:,} of {comparison.baseline}; "
                    f"at most {tolerance:.2%} is fair"
                )
    if problems:
        raise ConfigError("the contestants are not equal:\n" + "\n".join(problems))


def check_folders(runs: Sequence[Run]) -> None:
    """Refuse folders that hold runs of other configurations: their figures would not be comparable.

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
                    f"{run.folder}: trained with another configuration, {difference}; choose another folder with "
                    "--out or remove this one"
                )


def _first_difference(there: Any, here: Any, field: str) -> str | None:
    if isinstance(there, dict) and isinstance(here, dict):
        names = {name: f"{field}.{name}" if field else name for name in (*there, *here)}
        found = (_first_difference(there.get(name), here.get(name), path) for name, path in names.items())
        return next(filter(None, found), None)
    return None if there == here else f"{field}={there} instead of {here}"


def ensure_data(data: PreparedText, questions: Path | None = None) -> None:
    """Write, prepare and cluster the corpora, unless that is already done.

    Args:
        questions: a file that must exist afterwards.

    Raises:
        ConfigError: the existing tree has another shape, or the questions are missing.
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
        # The tokenizer is trained on all corpora together. With by_corpus they are prepared together only for it.
        whole = text / "all" if data.by_corpus else folder
        if not (whole / MANIFEST_NAME).is_file():  # an interrupted call may have left it
            prepare(Preparation(files, whole, vocab_size=data.vocab_size))
        for source in missing if data.by_corpus else ():
            file = text / f"{source.name}.jsonl"
            prepare(Preparation([file], source, tokenizer=whole / "tokenizer"))
        shutil.rmtree(text)
    if questions is not None and not questions.is_file():
        raise ConfigError(
            f"{COMPARISON_FILE}: questions: {questions} is missing; kmem data prepare writes it for a corpus with "
            f"questions; if an older kmem prepared {folder}, remove the folder"
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
                f"{data.tree_folder}: has {counted(record['levels'], 'level')} of {record['children']} children, but "
                f"{COMPARISON_FILE} asks for {tree.levels} of {tree.children}; choose another data.folder"
            )
        if all(stored_tree(source) == record["fingerprint"] for source in sources):
            return
    print(f"clustering the documents of {data.folder}", flush=True)
    make_tree(TreeRequest(sources, data.tree_folder, tree.children, tree.levels, embedder="tfidf", force=True))
