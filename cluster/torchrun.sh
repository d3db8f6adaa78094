#!/bin/bash
# Train on any machines that reach each other. Run the same line on every node:
#   MASTER_ADDR=host0 NNODES=2 NPROC=8 cluster/torchrun.sh --config configs/imagenet/resnet50.yaml
# Ranks are handed out by the rendezvous on MASTER_ADDR; when a process dies all are started again (MAX_RESTARTS times)
# and go on from the newest checkpoint.

set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec torchrun \
  --nnodes "${NNODES:-1}" \
  --nproc_per_node "${NPROC:-1}" \
  --rdzv_backend c10d \
  --rdzv_id "${RUN_ID:-featherlight}" \
  --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" \
  --max_restarts "${MAX_RESTARTS:-3}" \
  --no-python featherlight fit "$@" \
  --config configs/trainer/torchrun.yaml \
  --trainer.num_nodes "${NNODES:-1}" \
  --trainer.devices "${NPROC:-1}" \
  --ckpt_path auto
