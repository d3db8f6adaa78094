#!/usr/bin/env bash
# The main job in two minutes on two CPU cores, offline: train a teacher of one family, distil it into a smaller student
# of another while pruning that, test both, compare them, and predict.
set -euo pipefail
export OMP_NUM_THREADS=2 # one process at a time: it may have both cores

runs=runs/quickstart
rm -rf "$runs"

echo "== 1/5  a teacher (ConvNet) learns the sample data"
featherlight fit --config configs/quickstart.yaml --config configs/quickstart_teacher.yaml

echo "== 2/5  test the teacher"
featherlight test --config configs/quickstart.yaml --config configs/quickstart_teacher.yaml --ckpt_path auto

echo "== 3/5  distil it into a student (ViT) that is pruned on the way"
featherlight fit --config configs/quickstart.yaml \
  --trainer.callbacks+=configs/callbacks/kd.yaml \
  --trainer.callbacks.teacher null \
  --trainer.callbacks.weights "$runs/teacher/checkpoints/last.ckpt" \
  --trainer.callbacks+=configs/callbacks/magnitude_pruning.yaml

echo "== 4/5  test the student"
featherlight test --config configs/quickstart.yaml --ckpt_path auto

echo "== 5/5  predict"
featherlight predict --config configs/quickstart.yaml --ckpt_path auto \
  --trainer.callbacks+=configs/callbacks/predictions.yaml

featherlight results "$runs/teacher" "$runs/student"
echo "Predictions: $runs/student/predictions.csv; picture: $runs/student/contact_sheet.png"
