"""Export and import hold a slice of the model, however large it is."""

import json
import os
from pathlib import Path

import pytest
import torch

from kmem.checkpoint.commit import Progress
from kmem.checkpoint.writer import write_weights
from kmem.data.engram_addresses import model_addresses
from kmem.hf.importing import starting_config
from kmem.model.bank_layout import BankLayout
from kmem.model.bank_tree import read_tree_record
from kmem.model.engram_reader import table_name
from kmem.model.parameter_counts import tensor_shapes
from tests.hf.banks import BANKS, make_tree, write_bank_run
from tests.hf.models import EXPERTS, GQA, memory, model, tokenizer, write_run
from tests.warm_processes import WITH_KMEM, start_program

MEASURE = """
import ctypes, sys, threading, time
from pathlib import Path
import torch, transformers
from kmem.checkpoint.reader import CheckpointReader
from kmem.hf.export import export
from kmem.hf.importing import import_folder
from kmem.hf.loading import load

# Freed blocks go back to the system at once, so that later work cannot hide in what earlier work left.
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536) and ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
torch.set_num_threads(1)
folder = Path(sys.argv[1])

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def peak(work):
    high, done = 0, False
    def watch():
        nonlocal high
        while not done:
            high = max(high, anonymous())
            time.sleep(0.001)
    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done = True
    thread.join()
    return high - before

def export_run(run, out):
    export(CheckpointReader(folder / run), folder / out, say=str)

def forward(model):
    with torch.no_grad():
        model(torch.arange(256).view(1, 256))

# The small model brings lazy imports and caches; only the large one is measured.
export_run("small", "small-out")
import_folder(folder / "small-out", folder / "small-back", say=str)
forward(load(folder / "small-out")[0])
print(peak(lambda: export_run("large", "out")))
print(peak(lambda: import_folder(folder / "out", folder / "back", say=str)))
print(peak(lambda: forward(load(folder / "out")[0])))
print(peak(lambda: forward(load(folder / "large")[0])))
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def measure(folder):
    """Peaks of export, import, and a forward pass from the export and from the run, of the runs small and large."""
    process = start_program(WITH_KMEM, MEASURE, [str(folder)], os.environ, folder)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return list(map(int, out.split()[-4:]))


def write_large(folder, config, **manifests):
    """The run `large` of random numbers, with the tokenizer of the run `small`; returns the shapes of its tensors."""
    shapes, block = tensor_shapes(config.shape), torch.randn(1 << 22)

    def parts(name):
        left = torch.Size(shapes[name]).numel()
        while left:
            yield block[: min(left, len(block))]
            left -= min(left, len(block))

    progress = Progress(step=1, consumed_samples=0, tokens=0, optimizer_steps=0)
    start = starting_config(folder / "large", config)
    write_weights(folder / "large" / "checkpoints", progress, start, shapes, parts, **manifests)
    os.symlink(folder / "small" / "tokenizer", folder / "large" / "tokenizer")
    return shapes


def test_peak_memory_is_below_twice_the_largest_tensor(tmp_path):
    attention = {**GQA, "qk_norm": True}
    write_run(tmp_path / "small", model(attention, EXPERTS))
    large = model(
        attention,
        {"num_experts": 32, "top_k": 2, "intermediate_size": 128},
        vocab_size=16384,
        hidden_size=256,
        num_layers=7,
    )
    shapes = write_large(tmp_path, large)
    exporting, importing, _, _ = measure(tmp_path)

    sizes = {name: 4 * torch.Size(shape).numel() for name, shape in shapes.items()}
    largest = max(sizes.values())
    print(json.dumps({"model": sum(sizes.values()), "largest": largest, "export": exporting, "import": importing}))
    assert sum(sizes.values()) > 100e6
    assert exporting < 2 * largest
    assert importing < 2 * largest


def test_a_table_passes_through_in_slices_and_is_never_loaded(tmp_path):
    """Whatever its size: two tables of 128 MB, of which no process holds more than a slice."""
    write_run(tmp_path / "small", memory("qwen", row_multiple=1))
    large = memory("qwen", layers=[0, 1], row_multiple=1, rows_per_head=125_000, row_dim=64, heads=2)
    shapes = write_large(
        tmp_path, large, manifests={"engram": model_addresses(large, tokenizer()).addressing.to_manifest()}
    )
    exporting, importing, mapped, from_run = measure(tmp_path)
    tables = sum(4 * torch.Size(shapes[table_name(layer)]).numel() for layer in (0, 1))
    print(json.dumps({"tables": tables, "export": exporting, "import": importing, "mapped": mapped, "run": from_run}))
    assert tables > 250e6
    assert max(exporting, importing) < 80e6  # a slice is 32 MiB
    assert max(mapped, from_run) < 20e6


def test_a_bank_passes_through_in_slices_and_a_context_loads_its_blocks(tmp_path):
    """Rows of 40 MB, which are longer than a slice, and of 6 MB; a forward pass of one context holds one of each."""
    write_bank_run(tmp_path / "small", BANKS["ffn"])
    config = model(GQA, None, hidden_size=256, num_layers=4, bank={"children": 4, "levels": [3414, 512], "kind": "ffn"})
    own = make_tree(tmp_path / "large" / "tree", children=4)
    write_large(tmp_path, config, manifests={"bank": read_tree_record(own)})
    exporting, importing, mapped, from_run = measure(tmp_path)
    layout = BankLayout.of(config.shape)
    bank, fetched = 4 * layout.bank_values, 4 * layout.fetched_values
    figures = {"bank": bank, "fetched": fetched, "export": exporting, "import": importing, "mapped": mapped}
    print(json.dumps({**figures, "run": from_run}))
    assert bank > 250e6
    assert max(exporting, importing) < 80e6  # a slice is 32 MiB
    assert max(mapped, from_run) < 2.5 * fetched  # twice while the layers' columns are put side by side
