"""The commands as a user types them."""

import re

import pytest

from kmem.cli import main
from kmem.config import UserError
from kmem.hf.export_command import parse_size
from tests.hf.models import NATIVE, write_run


def test_export_generate_import(tmp_path, capsys):
    reader = write_run(tmp_path / "run", NATIVE["deepseek_v3"])
    run, out, back = (str(tmp_path / name) for name in ("run", "out", "back"))
    assert main(["export", "--checkpoint", run, "--out", out, "--max-shard-size", "40kB", "--dtype", "bf16"]) == 0
    printed = capsys.readouterr().out
    assert "DeepSeek-V3 (DeepseekV3ForCausalLM): " in printed
    assert main(["export", "--checkpoint", run, "--out", out]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["export", "--checkpoint", str(reader.folder), "--out", out, "--force", "--custom-code"]) == 0
    assert "--custom-code" in capsys.readouterr().out
    assert main(["generate", "--checkpoint", out, "--prompt", "the", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("the")
    assert main(["import", "--from", out, "--out", back]) == 0
    assert main(["generate", "--checkpoint", back, "--prompt", "the", "--max-new-tokens", "3"]) == 0


def test_a_damaged_checkpoint_is_not_exported(tmp_path, capsys):
    reader = write_run(tmp_path / "run", NATIVE["llama"])
    part = next(reader.folder.glob("*.safetensors"))
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    assert main(["export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert re.search(f"{part}: .*digest", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_sizes():
    assert [parse_size(text) for text in ("2GB", "1.5 mb", "512MiB", "7")] == [2 * 10**9, 1_500_000, 512 << 20, 7]
    for text in ("", "GB", "-1GB", "2 bananas", "0"):
        with pytest.raises(UserError, match=f"--max-shard-size {text}: "):
            parse_size(text)
