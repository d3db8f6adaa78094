#!/bin/bash
# Train on any machines that reach each other. Run the same line on every node, from the repository's folder:
#   MASTER_ADDR=host0 NNODES=2 NPROC=8 cluster/torchrun.sh --config configs/imagenet/resnet50.yaml
# Ranks are handed out by the c10d rendezvous on MASTER_ADDR; when a process dies all are started again (MAX_RESTARTS
# times) and go on from the newest checkpoint. torchrun's static rendezvous (--master_addr, --node_rank) never restarts
# anything across nodes, whatever --max_restarts says, so it is not used here.
# Every option and config of yours wins over what this script sets. More: docs/clusters.md.

set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# otherwise the first restart meets the store of the attempt that died, fails, and costs a second one
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
  --nnodes "${NNODES:-1}" \
  --nproc_per_node "${NPROC:-1}" \
  --rdzv_backend c10d \
  --rdzv_id "${RUN_ID:-featherlight}" \
  --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" \
  --max_restarts "${MAX_RESTARTS:-3}" \
  --no-python featherlight fit \
  --config configs/trainer/torchrun.yaml \
  --config "{trainer: {num_nodes: ${NNODES:-1}, devices: ${NPROC:-1}}, ckpt_path: auto}" \
  "$@"
