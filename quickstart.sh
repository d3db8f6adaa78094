#!/usr/bin/env bash
# What this is for, in minutes on two CPU cores, offline: a teacher of one family, a smaller student of another that learns
# alone, and the same student distilled from the teacher; all three are tested, the last predicts.
set -euo pipefail
export OMP_NUM_THREADS=2 # one process at a time: it may have both cores

runs=runs/quickstart
rm -rf "$runs"

echo "== 1/7  a teacher (ConvNet) learns the sample data"
featherlight fit --config configs/quickstart.yaml --config configs/quickstart_teacher.yaml

echo "== 2/7  test the teacher"
featherlight test --config configs/quickstart.yaml --config configs/quickstart_teacher.yaml --ckpt_path best

echo "== 3/7  a student (ViT) learns alone"
featherlight fit --config configs/quickstart.yaml --config configs/quickstart_alone.yaml

echo "== 4/7  test it"
featherlight test --config configs/quickstart.yaml --config configs/quickstart_alone.yaml --ckpt_path best

echo "== 5/7  the same student learns from the teacher, too"
featherlight fit --config configs/quickstart.yaml \
  --trainer.callbacks+=configs/callbacks/kd.yaml \
  --trainer.callbacks.teacher null \
  --trainer.callbacks.weights "$runs/teacher/checkpoints/last.ckpt"

echo "== 6/7  test it"
featherlight test --config configs/quickstart.yaml --ckpt_path best

echo "== 7/7  predict"
featherlight predict --config configs/quickstart.yaml --ckpt_path best \
  --trainer.callbacks+=configs/callbacks/predictions.yaml

featherlight results "$runs/alone" "$runs/teacher" "$runs/student"
echo "Predictions: $runs/student/predictions.csv; picture: $runs/student/contact_sheet.png"
COLUMNS=200 featherlight results "$runs/teacher" "$runs/student" | tail -n 1
COLUMNS=200 featherlight results "$runs/alone" "$runs/student" | tail -n 1
