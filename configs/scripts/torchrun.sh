#!/usr/bin/env bash
# A recipe on several nodes without a scheduler, stage by stage by torchrun. Start it on every node, in the same folder
# of a file system that all of them share; a node waits for the others at each stage:
#
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash configs/scripts/torchrun.sh configs/recipes/qwen3-4b-math
#   NUM_NODES=2 NODE_RANK=1 MASTER_ADDR=node0 bash configs/scripts/torchrun.sh configs/recipes/qwen3-4b-math
#
# After a fault start it again on all nodes: finished calls are kept, and training resumes from its newest checkpoint.
# One node needs none of this: `sdzero run RECIPE --devices 8` starts its own processes.
set -euo pipefail

RECIPE=${1:?usage: torchrun.sh RECIPE_DIR}
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}                # 0 on MASTER_ADDR, then 1, 2, ...
DEVICES=${DEVICES:-8}                    # processes on each node, one a GPU
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}    # a node that all others reach
MASTER_PORT=${MASTER_PORT:-29500}        # free on that node
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}  # per process; torchrun would take 1

stage() {
    # A rank that ends with an error ends those of its node, and their closed connections the other nodes'.
    # SIGTERM and SIGUSR1 are passed on: the training saves at its next step, for which it gets ten minutes, and ends.
    torchrun --nnodes="$NUM_NODES" --node-rank="$NODE_RANK" --nproc-per-node="$DEVICES" \
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=600 \
        -m sdzero "$@"
}

TRAINER=(--trainer.devices="$DEVICES" --trainer.num_nodes="$NUM_NODES")
# the recipe's stages in order, and the evaluation of the last model
stages=$(python - "$RECIPE" <<'LIST'
import sys
from pathlib import Path
from sdzero.utils.recipe import load_recipe
recipe = load_recipe(Path(sys.argv[1]))
for entry in recipe.entries:
    if entry.trains:
        print(entry.command, entry.file)
print("test", recipe.evaluation)
LIST
)
while read -r -u 3 command file; do
    case $command in
        collect) stage collect --config "$RECIPE/$file" --devices="$DEVICES" --num_nodes="$NUM_NODES" ;;
        test) stage test --config "$RECIPE/$file" "${TRAINER[@]}" ;;
        fit) stage fit --config "$RECIPE/$file" "${TRAINER[@]}" --ckpt_path=newest ;;
    esac
done 3<<< "$stages"
