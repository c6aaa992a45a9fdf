# ruff: noqa: E402
# %% [markdown]
# # A look inside a training step
#
# A small model with an engram (n-gram memory) is built from a dict and trained for one step, in this process and on the
# CPU. Its table is read before and after: only the rows that the step looked up have moved.
#
#     python examples/look_inside.py
#
# Editors that know `# %%` run it cell by cell.

# %%
import os
import tempfile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported

from small_corpus import small_corpus, small_run

from kmem.config import parse_config

folder = Path(tempfile.mkdtemp())
tree = small_run(folder, small_corpus(folder), steps=1)
tree["model"]["engram"] = {"layers": [1], "orders": [2, 3], "heads": 2, "rows_per_head": 500, "row_dim": 8}
tree["engram"] = {"store": "host", "optimizer": {"name": "lazy_adam"}}
config = parse_config(tree)

# %% [markdown]
# The mesh has one rank. `prepare` gives what a kind of memory needs beyond the configuration: of an engram, the
# addresses of n-grams, which depend on the tokenizer.

# %%
from kmem.data.reader import open_data
from kmem.parallel.joining import join_mesh, leave_mesh
from kmem.parallel.memory_kinds import kinds_of
from kmem.parallel.pipeline import Pipeline, split_samples

mesh = join_mesh(config)
data = open_data(config.data, config.model.vocab_size)
prepared = {kind.name: kind.prepare(config, data.tokenizer_path) for kind in kinds_of(config.model.shape)}
pipeline = Pipeline(config, mesh, prepared)

# %% [markdown]
# ## Weights and rows
#
# Weights are parameters of the pipeline's layers, under names that are the same on every mesh. Rows are no parameters:
# they lie in tables, beside the engine.

# %%
for name, parameter in pipeline.named_parameters():
    if name.startswith("layers.1."):
        print(f"{name:45} {tuple(parameter.shape)}")
tables = pipeline.stage_tables.tables
for name, table in tables.items():
    print(f"{name:45} {table.spec.rows} rows of {table.spec.dim} values, in {table.spec.store} memory")

# %% [markdown]
# ## One step
#
# `begin_step` plans the rows from token ids and fetches them; `train_step` waits for them, runs forward and backward
# passes, and updates weights and rows.

# %%
table = tables["layers.1.engram.table"]
before = table.read_rows(0, table.spec.rows)
plan = split_samples(0, config.train.global_batch_size, config.train.micro_batch_size, mesh)
begun = pipeline.begin_step([data.training.read(samples) for samples in plan])
result = pipeline.train_step(begun, lr=config.train.optimizer.lr)
print(f"loss {result.loss:.4f} over {result.tokens} tokens, norm of the weights' gradient {result.grad_norm:.3f}")
figures = result.memories["engram"]["1"]
print(f"{figures['addresses']} look-ups of {figures['touched_rows']} rows, mean gate {figures['gate_mean'][0]:.3f}")

# %% [markdown]
# ## Which rows moved

# %%
after = table.read_rows(0, table.spec.rows)
moved = (after != before).any(dim=1)
read = begun.tickets["layers.1.engram.table"].owned_rows
print(f"{int(moved.sum())} of {table.spec.rows} rows moved; {len(read)} were read")
assert not moved[~moved.new_zeros(len(moved)).index_fill(0, read, True)].any(), "a row moved that nobody read"
for row in moved.nonzero().flatten()[:5].tolist():
    step = (after[row] - before[row]).norm()
    print(f"row {row:4}: norm {before[row].norm():.4f} -> {after[row].norm():.4f}, moved by {step:.4f}")

# %%
pipeline.close()
leave_mesh()
