#!/usr/bin/env bash
# sbatch launch/slurm.sh --config CONFIG.yaml [--set FIELD=VALUE ...]
#
# One torchrun agent per node. Slurm sends SIGTERM two minutes before the time limit: the run saves, the job is queued
# again and continues from its newest checkpoint (checkpoint.resume: auto).
#SBATCH --job-name=kmem
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit with sbatch}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# How long torchrun lets ranks finish their step and save before it kills them.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110

srun --kill-on-bad-exit=1 .venv/bin/torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
    --module kmem.pretrain "$@" &
agents=$!

requeue() {
    echo "time limit near: saving and queueing again"
    kill -TERM "$agents"
    wait "$agents" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue TERM
wait "$agents"
