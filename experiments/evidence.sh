#!/usr/bin/env bash
# The models and scores of RESULTS.md on shapes, MNIST and Fashion-MNIST, without its searches.
#
#     bash experiments/evidence.sh 0 1 2
#
# Scores are added to runs/evidence/*.jsonl; report.py makes tables and curves of them. Those of RESULTS.md
# lie in experiments/results. MNIST=npz:FILE takes another copy of MNIST.
set -euo pipefail
cd "$(dirname "$0")/.."
results=runs/evidence
mkdir -p $results
mnist=${MNIST:-mnist}
score() {   # METHOD FLAGS of fid.py
  python fid.py "${@:2}" | tail -n 1 | sed "s/^{/{\"method\": \"$1\", /" >> "$results/$1.jsonl"
}
tune() { python train.py --recipe "$1" --seed "$2" --init_from "runs/shapes32-$2" "${@:3}"; }

for seed in "$@"; do
  many=runs/shapes32-$seed
  python train.py --recipe shapes32 --seed "$seed" --out "$many"
  score many --ckpt "$many" --steps 40 --seed "$seed"
  score many-sharp --ckpt "$many" --steps 40 --kappa 0.7 --seed "$seed"
  tune shapes32-few "$seed" --out "runs/few-$seed"
  for steps in 1 2; do score few --ckpt "runs/few-$seed" --steps $steps --seed "$seed"; done
  score few --ckpt "runs/few-$seed" --steps 4 --gap 0.001,0.3 --seed "$seed"
  score few-fresh --ckpt "runs/few-$seed" --steps 2 --rho 1 --seed "$seed"
  tune shapes32-one "$seed" --out "runs/one-$seed"
  for steps in 1 2; do score one --ckpt "runs/one-$seed" --steps $steps --seed "$seed"; done
  score one-fresh --ckpt "runs/one-$seed" --steps 2 --rho 1 --gap 0.001,0.5 --seed "$seed"

  # the same run trained for twice as long; 1,000 steps, 5.0 % of its compute, to two calls, and 5,000 to one
  twice=runs/twice-$seed
  [ -d "$twice" ] || cp -r "$many" "$twice"
  python train.py --recipe shapes32 --steps 30000 --seed "$seed" --out "$twice"
  score twice --ckpt "$twice" --steps 40 --seed "$seed"
  score twice-sharp --ckpt "$twice" --steps 40 --kappa 0.7 --seed "$seed"
  tune shapes32-few "$seed" --init_from "$twice" --steps 1000 --optimizer muon --ema 0.995 \
    --out "runs/twice-few-$seed"
  tune shapes32-one "$seed" --init_from "$twice" --steps 5000 --out "runs/twice-one-$seed"
  for run in twice-few twice-one; do
    for steps in 1 2; do score $run --ckpt "runs/$run-$seed" --steps $steps --seed "$seed"; done
  done
  score twice-few --ckpt "runs/twice-few-$seed" --steps 4 --gap 0.001,0.3 --seed "$seed"

  # peers, from the same model: consistency training without a teacher (ECT-like) for as many passes, MeanFlow
  # for as many seconds, and other samplers
  tune shapes32-few "$seed" --zeta 0 --style none --steps 528 --out "runs/ect-$seed"
  for steps in 1 2; do score ect --ckpt "runs/ect-$seed" --steps $steps --seed "$seed"; done
  score ect-fresh --ckpt "runs/ect-$seed" --steps 2 --rho 1 --seed "$seed"
  peers() {   # TASK FILE FLAGS
    python experiments/peers.py "$1" --ckpt "$many" --seed "$seed" --out "$results/$2.jsonl" "${@:3}"
  }
  peers meanflow meanflow --num 10000 --seconds 106
  peers curves "curves-$seed" --num 2000 --nfe 4,8,20,40 --kappas 0,auto,0.5,0.7
  peers curves "curves-$seed" --num 2000 --nfe 80 --kappas 0 --no-others
  python experiments/pose.py --ckpt "$many"

  # MNIST: the recipes, then twice the training and 5.0 % of its compute
  tune_mnist() {   # FROM NAME FLAGS
    python train.py --recipe mnist-few --data "$mnist" --seed "$seed" --init_from "runs/$1-$seed" \
      --out "runs/$2-$seed" "${@:3}"
  }
  python train.py --recipe mnist --data "$mnist" --seed "$seed" --out "runs/mnist-$seed"
  tune_mnist mnist mnist-few
  [ -d "runs/mnist-twice-$seed" ] || cp -r "runs/mnist-$seed" "runs/mnist-twice-$seed"
  python train.py --recipe mnist --steps 18000 --data "$mnist" --seed "$seed" --out "runs/mnist-twice-$seed"
  tune_mnist mnist-twice mnist-twice-few --steps 600 --lr 4e-3 --derivative central
  for run in mnist mnist-twice; do
    score $run --ckpt "runs/$run-$seed" --steps 40 --seed "$seed"
  done
  for steps in 2 4; do score mnist-few --ckpt "runs/mnist-few-$seed" --steps $steps --seed "$seed"; done
  tune_mnist mnist mnist-few-again --seed "1$seed"
  for steps in 1 2 4; do
    score mnist-few-again --ckpt "runs/mnist-few-again-$seed" --steps $steps --seed "$seed"
  done
  fresh() {   # METHOD NAME: with fresh noise for the second call
    for steps in 1 2; do
      score "$1" --ckpt "runs/$2-$seed" --steps $steps --rho 1 --gap 0.001,0.5 --seed "$seed"
    done
  }
  fresh mnist-few-fresh mnist-few
  fresh mnist-twice-few mnist-twice-few
  tune_mnist mnist mnist-ect --zeta 0 --style none --steps 450
  fresh mnist-ect-fresh mnist-ect
  score mnist-ect --ckpt "runs/mnist-ect-$seed" --steps 2 --seed "$seed"
  many=runs/mnist-$seed
  peers meanflow mnist-meanflow --num 5000 --seconds 107 --data "$mnist"
  peers curves "curves-mnist-$seed" --num 2000 --nfe 20,40 --kappas 0,0.5,0.7 --no-others --data "$mnist"
  peers curves "curves-mnist-$seed" --num 2000 --nfe 80 --kappas 0 --no-others --data "$mnist"

  # Fashion-MNIST, by two metrics: forty calls, twenty, few, and peers as above
  many=runs/fashion-$seed
  python train.py --recipe fashion --seed "$seed" --out "$many"
  fashion() {   # NAME RUN FLAGS
    score "fashion$1" --ckpt "$2" --num 5000 --effnet --seed "$seed" "${@:3}"
  }
  tune_fashion() {   # NAME FLAGS
    python train.py --recipe fashion-few --seed "$seed" --init_from "$many" \
      --out "runs/fashion-$1-$seed" "${@:2}"
  }
  for steps in 20 40; do fashion "" "$many" --steps $steps; done
  tune_fashion few
  for steps in 1 2 4; do fashion -few "runs/fashion-few-$seed" --steps $steps; done
  tune_fashion ect --zeta 0 --style none --steps 900
  for steps in 1 2; do fashion -ect "runs/fashion-ect-$seed" --steps $steps; done
  peers meanflow fashion-meanflow --num 5000 --seconds 340 --effnet
  peers curves "curves-fashion-$seed" --num 2000 --nfe 20 --kappas 0,auto,0.7 --effnet
done
python experiments/report.py "$results"/*.jsonl
