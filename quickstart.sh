#!/usr/bin/env bash
# What this is for, in minutes on two CPU cores, offline: a teacher that learns from 7,600 drawn pictures; a small student
# that has 400 of them, alone; the same student, pictures and steps with the teacher beside it; and that one in int8.
# All are tested on the same 2,000 other pictures by onnxruntime, as they would be deployed.
set -euo pipefail
export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE # both cores for the one process; what waits gives way to other programs

seed=${1:-0}
runs=runs/quickstart
rm -rf "$runs"
common=(--config quickstart --seed_everything "$seed")

echo "== 1/8  a teacher learns from 7,600 pictures"
featherlight fit "${common[@]}" --config quickstart_teacher

echo "== 2/8  test the teacher"
featherlight test "${common[@]}" --config quickstart_teacher --ckpt_path best --trainer.callbacks+=onnxruntime

echo "== 3/8  a student of a quarter of its size learns from 400 of them, alone"
featherlight fit "${common[@]}" --config quickstart_alone

echo "== 4/8  test it"
featherlight test "${common[@]}" --config quickstart_alone --ckpt_path best --trainer.callbacks+=onnxruntime

echo "== 5/8  the same student, pictures and steps, with the teacher's opinions"
featherlight fit "${common[@]}" --trainer.callbacks+=kd --trainer.callbacks.teacher null \
  --trainer.callbacks.weights "$runs/teacher/checkpoints/last.ckpt" --trainer.callbacks.criterion.temperature 4

echo "== 6/8  test it"
featherlight test "${common[@]}" --ckpt_path best --trainer.callbacks+=onnxruntime

echo "== 7/8  test it in int8"
featherlight test "${common[@]}" --trainer.default_root_dir "$runs/distilled_int8" --trainer.callbacks+=int8 \
  --checkpoint.dirpath "$runs/distilled/checkpoints" --ckpt_path best

echo "== 8/8  predict"
featherlight predict "${common[@]}" --ckpt_path best --trainer.callbacks+=predictions

echo "Predictions: $runs/distilled/predictions.csv; a picture of them: $runs/distilled/contact_sheet.png"
echo "Both students saw the same 400 pictures in the same steps; the teacher had learned from these and 7,200 others."
echo "Latency: of one picture in onnxruntime, one thread."
featherlight results "$runs/alone" "$runs/distilled" "$runs/teacher" "$runs/distilled_int8"
