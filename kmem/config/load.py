"""From YAML files, includes and dotted overrides to a checked Config, and back."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from kmem.config.errors import ConfigError
from kmem.config.problems import explain
from kmem.config.renamed import saved_config
from kmem.config.run import Config

SAVED = ("config.yaml", "model.yaml")
"""Files that kmem itself writes into a run folder."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: a YAML file, or the name of a packaged config such as `quickstart`.
        overrides: `model.moe.top_k=4` style assignments; values are read as YAML. They win over the file.

    Raises:
        ConfigError: names the file or the path of the field, and the remedy.
    """
    tree = _read(find_config(path), (), {})
    for override in overrides:
        field, equals, value = override.partition("=")
        if not (field and equals):
            raise ConfigError(f"--set {override}: expected path.of.field=value")
        try:
            OmegaConf.update(tree, field, OmegaConf.from_dotlist([f"value={value}"]).value, merge=True, force_add=True)
        except Exception as error:  # bad YAML in the value, or a path through something that is not a section
            raise ConfigError(f"--set {field}: {str(error).splitlines()[0]}") from None
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    return parse_config(plain)


def parse_config(tree: Any) -> Config:
    """Check a plain tree of dicts and lists against the sections.

    Raises:
        ConfigError: one line per problem, each starting with the path of the field.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error.errors(), Config))) from None


def with_vocab_size(config: Config, size: int) -> Config:
    """The configuration with `model.vocab_size` as a number: `size`, unless it has one.

    Raises:
        ConfigError: the size does not go with another field.
    """
    if config.model.vocab_size is not None:
        return config
    tree = config.model_dump(mode="json")
    return parse_config({**tree, "model": {**tree["model"], "vocab_size": size}})


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; loading it gives an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def find_config(path: str | Path) -> Path:
    """The file itself, or a packaged config of that name.

    Raises:
        ConfigError: neither exists; suggests similar names.
    """
    direct = Path(path)
    if _is_file(direct):
        return direct
    for folder in config_folders():
        for candidate in (folder / direct, folder / f"{path}.yaml"):
            if _is_file(candidate):
                return candidate
    near = _near(direct)
    raise ConfigError(
        f"--config {path}: no such file or packaged config"
        + (f"; did you mean {' or '.join(near)}?" if near else ";")
        + " kmem train --help lists the packaged ones"
    )


def _near(path: Path) -> list[str]:
    """Packaged configs, and YAML files in the same folder, with names like this one."""
    names = {name: name for name in packaged_configs()}
    names |= {name.rpartition("/")[2]: name for name in reversed(names)}  # known by the last part, too
    if path.parent.is_dir():
        names |= {str(file.with_suffix("")): str(file) for file in path.parent.glob("*.yaml")}
    wanted = str(path.with_suffix("") if path.suffix in (".yaml", ".yml") else path)
    matches = difflib.get_close_matches(wanted, names, n=6)
    return list(dict.fromkeys(names[name] for name in matches))[:3]


def config_folders() -> list[Path]:
    """Where packaged configs lie: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def packaged_configs() -> list[str]:
    """Names under which packaged configs can be loaded."""
    names = {
        file.relative_to(folder).with_suffix("").as_posix()
        for folder in config_folders()
        for file in folder.rglob("*.yaml")
        if file.name != "compare.yaml"  # describes a comparison of configs
    }
    return sorted(names)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that holds a zero byte
        return False


def _read(path: Path, seen: tuple[Path, ...], known: dict[Path, Any]) -> Any:
    """The tree of a file with what it includes; `known` holds the trees of files that were read before."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(
            f"{path}: include goes in a circle through {' -> '.join(file.name for file in (*seen, path))}"
        )
    if path in known:
        return known[path]
    try:
        tree = OmegaConf.load(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error})") from None
    except Exception as error:  # OmegaConf passes on whatever error the YAML reader raises
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of sections")
    if path.name in SAVED and (path.parent / "checkpoints").is_dir():
        tree = OmegaConf.create(saved_config(OmegaConf.to_container(tree)))
    base = tree.pop("include", None)
    base = OmegaConf.to_container(base) if OmegaConf.is_config(base) else base
    bases: list[Any] = base if isinstance(base, list) else [] if base is None else [base]
    if not all(isinstance(name, str) for name in bases):
        raise ConfigError(f"{path}: include: expected the name of a config, or a list of names (got {base!r})")
    merged: Any = OmegaConf.create()
    for name in bases:
        beside = path.parent / os.path.expanduser(name)
        included = _read(beside if _is_file(beside) else find_config(name), (*seen, path), known)
        merged = _merged(path, merged, included)
    known[path] = _merged(path, merged, tree)
    return known[path]


def _merged(path: Path, under: Any, over: Any) -> Any:
    try:
        return OmegaConf.merge(under, over)
    except Exception as error:  # of several kinds; for example a section in one file, and a number in the other
        raise ConfigError(f"{path}: does not go with what it includes: {str(error).splitlines()[0]}") from None
