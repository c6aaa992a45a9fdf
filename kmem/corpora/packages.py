"""Data in installable packages: read where it is installed, else fetched by pip or apt without installing it."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kmem.config import UserError
from kmem.model.file_digest import file_digest


@dataclass(frozen=True)
class Package:
    """An opened package."""

    root: Path
    """Root of its files: for wheels the folder that holds the modules, for Debian packages the root directory."""
    version: str
    origin: str
    """`installed`, or the file name of the archive."""
    sha256: str | None
    """Digest of the archive; None if there is none."""


def default_cache() -> Path:
    """The folder that keeps downloaded packages."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kmem" / "packages"


def wheel_at_hand(name: str, version: str, cache: Path) -> bool:
    """Whether `open_wheel` needs no network."""
    try:
        importlib.metadata.distribution(name)
        return True
    except importlib.metadata.PackageNotFoundError:
        return any(cache.glob(_wheels(name, version)))


@contextmanager
def open_wheel(name: str, version: str, cache: Path) -> Iterator[Package]:
    """A PyPI package: the installed one in any version, or the wheel of `version`, downloaded once into `cache` and
    unpacked for the duration of the block.

    Raises:
        UserError: the package is not installed and pip cannot download it, or the download is damaged.
    """
    try:
        installed = importlib.metadata.distribution(name)
        yield Package(Path(str(installed.locate_file(""))), installed.version, "installed", None)
        return
    except importlib.metadata.PackageNotFoundError:
        pass
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--quiet", "--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "15"]
    what = f"Python package {name} {version}"
    wheel = _in_cache([*command, f"{name}=={version}"], what, _wheels(name, version), cache)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)  # checks all sums
        except zipfile.BadZipFile:
            raise UserError(f"{wheel}: damaged; delete it and try again") from None
        yield Package(Path(folder), version, wheel.name, file_digest(wheel))


@contextmanager
def open_debian(name: str, cache: Path) -> Iterator[Package]:
    """A Debian package, downloaded once into `cache` and unpacked for the duration of the block; nothing is installed.

    Raises:
        UserError: apt-get or dpkg-deb is missing, or the package cannot be downloaded or is damaged.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(f"{tool}: not found; the package {name} can be fetched only on Debian and its derivatives")
    command = ["apt-get", "--quiet", "download", name]
    archive = _in_cache(command, f"Debian package {name}", f"{name}_*.deb", cache)
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["dpkg-deb", "-x", str(archive), folder], check=True, capture_output=True)
        except subprocess.CalledProcessError:
            raise UserError(f"{archive}: damaged; delete it and try again") from None
        yield Package(Path(folder), archive.name.split("_")[1], archive.name, file_digest(archive))


def _in_cache(command: list[str], what: str, pattern: str, cache: Path) -> Path:
    """The last file in the cache that matches. If there is none, run a download command in a temporary folder and move
    the one file that matches into the cache."""
    kept = list(cache.glob(pattern))
    if kept:
        return max(kept)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache {cache}: cannot be written ({error.strerror})") from None
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        archives = list(Path(folder).glob(pattern))
        if result.returncode or not archives:
            said = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
            errors = [line for line in said if line.startswith(("ERROR:", "E:"))] or [l for l in said if "rror" in l]
            reason = errors[-1] if errors else ""
            raise UserError(
                f"{what} could not be downloaded ({reason or said[-1] if said else 'no message'}). "
                f"Check that a package index can be reached, or put {pattern} into {cache}"
            )
        return archives[0].replace(cache / archives[0].name)


def _wheels(name: str, version: str) -> str:
    return f"{name.replace('-', '_')}-{version}-*.whl"
