#!/usr/bin/env bash
# What the derivative's precision is worth, and few steps from nothing ("The choices that tuning leaves open" in LOG.md): bash experiments/choices.sh runs/long
# The argument is a many-step model of the default recipe; scores go to experiments/results/choices.jsonl.
set -euo pipefail
cd "$(dirname "$0")/.."
try() {
  python train.py --recipe shapes-few --derivative fd --eps .02 --lr 1e-3 --steps 500 --out "runs/choice-$1" "${@:2}"
  for steps in 1 2; do python fid.py --ckpt "runs/choice-$1" --steps $steps --num 4000 | tail -n 1 >> experiments/results/choices.jsonl; done
}
try bf16-e02 --init_from "$1"
try bf16-e005 --init_from "$1" --eps .005
try fp32-e02 --init_from "$1" --dtype float32
try fp32-e005 --init_from "$1" --dtype float32 --eps .005
try bf16-jvp --init_from "$1" --derivative jvp
try scratch --init_from= --enhancement_ratio 0 --enhancement_style none --steps 4000
