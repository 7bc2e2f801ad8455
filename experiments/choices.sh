#!/usr/bin/env bash
# The choices that the paper leaves open ("Which settings matter?" in RESULTS.md), tried from three many-step
# models: a long run of the default recipe, the default recipe, and `mnist` (MNIST=npz:/FULL/PATH takes another
# copy).
#
#     bash experiments/choices.sh runs/long runs/shapes runs/mnist-0
#
# Scores are added to runs/choices.jsonl; those of RESULTS.md lie in experiments/results.
set -euo pipefail
cd "$(dirname "$0")/.."
long=$(realpath "$1") shapes=$(realpath "$2") digits=$(realpath "$3")
root=$PWD out=$PWD/runs/choices.jsonl
mnist=${MNIST:-mnist:$PWD/data}
try() {   # NAME FOLDER RECIPE N FLAGS: tune with the scripts of a folder, score two steps and one
  (cd "$2" && python train.py --recipe "$3" --out "$root/runs/choice-$1" "${@:5}")
  for steps in 1 2; do
    python fid.py --ckpt "runs/choice-$1" --steps $steps --num "$4" --seed 0 |
      tail -n 1 | sed "s/^{/{\"method\": \"$1\", /" >> "$out"
  done
}
clipped() {   # a copy of the scripts whose D is clipped at +-LIMIT
  mkdir -p "runs/clip-$1" && cp -r ./*.py assets "runs/clip-$1"
  sed -i "s/D.clamp(-1, 1)/D.clamp(-float('$1'), float('$1'))/" "runs/clip-$1/objective.py"
  grep -q "clamp(-float('$1')" "runs/clip-$1/objective.py"
  echo "runs/clip-$1"
}

# the derivative's precision, with the central difference, and few steps from nothing
precise() { try "$1" . shapes-few 4000 --derivative central --dt .02 --lr 1e-3 --steps 500 "${@:2}"; }
precise bf16-dt02 --init_from "$long"
precise bf16-dt005 --init_from "$long" --dt .005
precise fp32-dt02 --init_from "$long" --dtype float32
precise fp32-dt005 --init_from "$long" --dtype float32 --dt .005
precise bf16-jvp --init_from "$long" --derivative jvp
precise scratch --init_from= --zeta 0 --style none --steps 4000

# the teacher's style, zeta and the clip, at equal compute: 600 steps of 5 passes, 500 of 6, 750 of 4;
# on MNIST 360 and 300
shapes() { try "shapes-$1" "$2" shapes-few 4000 --init_from "$shapes" "${@:3}"; }
digits() {
  try "mnist-$1" "$2" mnist-few 5000 --init_from "$digits" --data "$mnist" "${@:3}"
}
shapes recipe .
shapes recipe-again . --seed 1
for zeta in 0.25 0.5 1; do shapes fe-$zeta . --style fc-vs-fe --zeta $zeta --steps 500; done
for zeta in 0.5 1.5; do shapes xz-$zeta . --zeta $zeta; done
shapes none . --zeta 0 --style none --steps 750
for limit in 0.3 3 inf; do shapes clip-$limit "$(clipped $limit)"; done
digits fe-0.5 . --style fc-vs-fe --zeta 0.5 --steps 300
for zeta in 0.5 1.5; do digits xz-$zeta . --zeta $zeta; done
for limit in 0.3 inf; do digits clip-$limit "$(clipped $limit)"; done
