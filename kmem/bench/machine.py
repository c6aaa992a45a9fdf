"""The machine that a figure was measured on, and how much of it the measurement may use."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version


def versions(*packages: str) -> str:
    """These packages with their versions."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def processor() -> str:
    """Name of the CPU and its wide instruction sets."""
    import torch  # imported here: it takes a second, and `--help` of the commands should not

    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    wide = [name for name in ("amx_tile", "avx512_f", "avx512_bf16") if capabilities.get(name)]
    name = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join(wide) or 'no AVX-512'})"


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within it, torch computes with this many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
