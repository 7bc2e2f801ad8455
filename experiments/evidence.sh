#!/usr/bin/env bash
# Everything that stands under "Two steps as good as forty" in RESULTS.md, for the seeds given: bash experiments/evidence.sh 0 1 2
# Scores go to experiments/results/*.jsonl; experiments/report.py makes tables and curves of them. MNIST=npz:FILE takes another copy of MNIST.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p experiments/results
results=experiments/results
mnist=${MNIST:-mnist}
score() { python fid.py "${@:2}" | tail -n 1 >> "$results/$1.jsonl"; }
tune() { python train.py --recipe shapes32-few --seed "$1" --init_from "runs/shapes32-$1" "${@:2}"; }

for seed in "$@"; do
  python train.py --recipe shapes32 --seed "$seed" --out "runs/shapes32-$seed"
  score many --ckpt "runs/shapes32-$seed" --steps 40 --seed "$seed"
  tune "$seed" --out "runs/shapes32-few-$seed"
  for steps in 1 2 4 8; do score few --ckpt "runs/shapes32-few-$seed" --steps $steps --seed "$seed"; done
  python train.py --recipe shapes32-one --seed "$seed" --init_from "runs/shapes32-$seed" --out "runs/one-$seed"
  for steps in 1 2; do score one --ckpt "runs/one-$seed" --steps $steps --seed "$seed"; done
  python train.py --recipe shapes32-mid --seed "$seed" --init_from "runs/shapes32-$seed" --out "runs/shapes32-mid-$seed"
  for steps in 2 4 8; do score mid --ckpt "runs/shapes32-mid-$seed" --steps $steps --seed "$seed"; done

  # peers, from the same model for the same seconds: consistency training without a teacher (ECT-like), MeanFlow, and other samplers
  tune "$seed" --enhancement_ratio 0 --enhancement_style none --steps 264 --out "runs/ect-$seed"
  for steps in 1 2 4; do score ect --ckpt "runs/ect-$seed" --steps $steps --seed "$seed"; done
  python experiments/peers.py meanflow --ckpt "runs/shapes32-$seed" --num 10000 --seconds 53 --seed "$seed" --out "$results/meanflow.jsonl"
  python experiments/peers.py curves --ckpt "runs/shapes32-$seed" --num 2000 --nfe 1,2,4,8,10,20,40 --kappas 0,auto,0.5 --seed "$seed" --out "$results/curves-$seed.jsonl"
  python experiments/peers.py curves --ckpt "runs/shapes32-$seed" --num 2000 --nfe 80 --kappas 0 --others no --seed "$seed" --out "$results/curves-$seed.jsonl"

  python train.py --recipe shapes32-fine --seed "$seed" --out "runs/fine-$seed"
  python train.py --recipe shapes32-fine-few --seed "$seed" --init_from "runs/fine-$seed" --out "runs/fine-few-$seed"
  score fine --ckpt "runs/fine-$seed" --steps 40 --seed "$seed"
  for steps in 1 2; do score fine-few --ckpt "runs/fine-few-$seed" --steps $steps --seed "$seed"; done
  python train.py --recipe shapes32-fine-one --seed "$seed" --init_from "runs/fine-$seed" --out "runs/fine-one-$seed"
  for steps in 1 2; do score fine-one --ckpt "runs/fine-one-$seed" --steps $steps --seed "$seed"; done

  python train.py --recipe shapes32 --optimizer muon --enhancement_ratio 0.3 --seed "$seed" --out "runs/muon-$seed"
  python train.py --recipe shapes32-few --gap 0.001,0.6 --seed "$seed" --init_from "runs/muon-$seed" --out "runs/muon-few-$seed"
  score muon --ckpt "runs/muon-$seed" --steps 40 --seed "$seed"
  for steps in 1 2; do score muon-few --ckpt "runs/muon-few-$seed" --steps $steps --seed "$seed"; done
  python experiments/pose.py --ckpt "runs/muon-$seed"

  python train.py --recipe mnist --data "$mnist" --seed "$seed" --out "runs/mnist-$seed"
  python train.py --recipe mnist-few --data "$mnist" --seed "$seed" --init_from "runs/mnist-$seed" --out "runs/mnist-few-$seed"
  score mnist --ckpt "runs/mnist-$seed" --steps 40 --seed "$seed"
  for steps in 1 2; do score mnist-few --ckpt "runs/mnist-few-$seed" --steps $steps --seed "$seed"; done
done
python experiments/report.py "$results"/*.jsonl
