import os
import subprocess
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

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


_LONG_FOLDERS = ("train", "distributed", "tables", "eval", "bench", "hf", "kernels")
"""Begun first where several processes share the files, so that none ends long after the others."""


def pytest_collection_modifyitems(config, items):
    folders = dict(zip(_LONG_FOLDERS, range(len(_LONG_FOLDERS)), strict=True))
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
