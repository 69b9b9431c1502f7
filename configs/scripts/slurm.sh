#!/usr/bin/env bash
# A recipe on 8 nodes of 8 GPUs by SLURM, stage by stage:
#
#   sbatch configs/scripts/slurm.sh configs/recipes/qwen3-4b-math [further options of `sdzero run`]
#
# Activate the environment first: `sdzero` and `python` are taken from PATH.
# Another sbatch with the same recipe resumes it, and so does the job after a requeue.
#SBATCH --job-name=sdzero
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
# `sdzero run` receives five minutes before the end: the training saves at its next step, and the job is requeued.
# B: the signal goes to this script's process, which is `sdzero run` by then; it passes it on.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

RECIPE=${1:?usage: sbatch slurm.sh RECIPE_DIR}
shift

# passed by `sdzero run` to every stage; Lightning compares it with the number of processes that SLURM has started
NUM_NODES=$SLURM_NNODES
DEVICES=$SLURM_NTASKS_PER_NODE
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from sbatch

# A rank that dies takes the others down; without it they would wait for it until their collectives time out.
# exec: the signal must reach `sdzero run`, not a shell that waits for it.
exec sdzero run "$RECIPE" --num-nodes "$NUM_NODES" --devices "$DEVICES" \
    --launch "srun --kill-on-bad-exit=1 python" "$@"
