"""The machine that a figure was measured on."""

import platform


def processor() -> str:
    """Name of the CPU and its wide instruction sets."""
    import torch  # imported here: it takes a second, and `--help` of the commands should not

    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    wide = [name for name in ("amx_tile", "avx512_f", "avx512_bf16") if capabilities.get(name)]
    name = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join(wide) or 'no AVX-512'})"
