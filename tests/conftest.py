import os
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
import torch.distributed as dist

# Triton reads it when it is first imported, which any library may do before the kernel tests run.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.distributed.rank_pool import RankPool
from tests.warm_processes import run_warm_program

pytest_plugins = ["tests.run_config", "tests.small_corpora"]
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the long cases")
    parser.addoption(
        "--minutes", type=float, metavar="N", help="start no test after N minutes; say which were left out"
    )


_UNTIL = "KMEM_TESTS_UNTIL"
"""Environment variable: the time, in seconds since 1970, after which no test starts. Worker processes inherit it."""
_LEFT_OUT = "no time left (--minutes)"
_TELLING_FOLDERS = (
    "model",
    "parallel",
    "tables",
    "checkpoint",
    "train",
    "distributed",
    "memories",
    "data",
    "hf",
    "eval",
)
"""Begun first if there may not be time for all."""


def pytest_configure(config):
    if config.getoption("--minutes") is not None:
        os.environ.setdefault(_UNTIL, str(time.time() + 60 * config.getoption("--minutes")))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if time.time() > float(os.environ.get(_UNTIL, "inf")):
        pytest.skip(_LEFT_OUT)


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", ())
    left_out = Counter(report.nodeid.split("::")[0] for report in skipped if _LEFT_OUT in str(report.longrepr))
    if left_out:
        files = ", ".join(f"{file} ({count})" for file, count in sorted(left_out.items()))
        terminalreporter.write_line(f"left out for want of time: {left_out.total()} tests of {files}")


_LONG_FOLDERS = ("train", "distributed", "tables", "eval", "bench", "hf", "kernels")
"""Begun first where several processes share the files, so that none ends long after the others."""


def pytest_collection_modifyitems(config, items):
    first = _LONG_FOLDERS if config.getoption("--minutes") is None else _TELLING_FOLDERS
    folders = dict(zip(first, range(len(first)), strict=True))
    items.sort(key=lambda item: folders.get(item.path.parent.name, len(folders)))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="long case: launch/test.sh --full"))


@pytest.fixture
def alone():
    """This process is the only rank of a world."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def gpu_ranks():
    """Rank processes on GPUs, for tests marked `gpu`."""
    pool = RankPool("cuda")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks():
    """Rank processes shared by all distributed tests of the session."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(params=["forked", pytest.param("executed", marks=pytest.mark.full)])
def run_without_kmem(request, tmp_path):
    """run(program text or path, *arguments, folder): a Python program in a folder, where this checkout is not on the
    path, in a fork that has imported torch and Transformers or in a new interpreter; its output and errors.
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}

    def run(program, *arguments, folder=tmp_path):
        words = list(map(str, arguments))
        if request.param == "forked":
            done = run_warm_program(program, words, environment, folder)
        else:
            command = [sys.executable, *(["-c"] if isinstance(program, str) else []), program, *words]
            done = subprocess.run(
                command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=240
            )
        assert done.returncode == 0, done.stderr
        return done

    return run
