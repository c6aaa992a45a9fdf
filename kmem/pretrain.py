"""One entry for every launcher: torchrun, the deepspeed launcher, Slurm, Kubernetes.

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m kmem.pretrain --config CONFIG.yaml
    deepspeed --hostfile HOSTFILE --module kmem.pretrain --config CONFIG.yaml

Rank and world size come from the environment. `--local_rank` is accepted and ignored. All other arguments go to
`kmem train`.
"""

import sys

from kmem.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
