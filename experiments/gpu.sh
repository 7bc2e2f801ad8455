#!/usr/bin/env bash
# What RESULTS.md says about GPUs, on one card, in under 8 minutes: each part has a time limit, all together have
# 480 s, and a part that fails or is cut does not stop the next.
#
#     bash experiments/gpu.sh                     # everything into runs/gpu/*.txt, shown at the end
#     PARTS='xl|tests' bash experiments/gpu.sh    # those whose name this regular expression fits
#     DEVICE=cpu bash experiments/gpu.sh          # a try with tiny sizes, on any machine
set -uo pipefail
cd "$(dirname "$0")/.."
out=runs/gpu device=${DEVICE:-cuda}
rm -rf "$out" && mkdir -p "$out"
xl="--model TiT-XL/1 --size 16 --channels 32 --classes 1000 --no-x_pred --seconds 2" steps="" short=400
if [ "$device" = cpu ]; then
  xl="--model TiT-XXS/1 --size 4 --channels 4 --classes 10 --no-x_pred --seconds 0.1" steps="--steps 20" short=20
fi
part() {    # SECONDS NAME COMMAND...: its output, its status and how long it took
  [[ $2 =~ ${PARTS:-.} ]] || return 0
  local begun=$SECONDS limit=$((470 - SECONDS < $1 ? 470 - SECONDS : $1))
  [ $limit -gt 0 ] || return 0
  timeout -s INT -k 10 $limit "${@:3}" > "$out/$2.txt" 2> "$out/$2.err"
  echo "status $?, $((SECONDS - begun)) s of $limit" >> "$out/$2.txt"
}
bench() { part "$1" "$2" python3 experiments/bench.py --device "$device" $xl --compiles "$3" "${@:4}"; }
train() { part "$1" "$2" python3 train.py --device "$device" --fresh --out "$out/$2" "${@:3}"; }
score() { part "$1" "$2" python3 fid.py --device "$device" --ckpt "$out/${2#score-}" --num 5000; }

# XL, for the published code's figures: lam 0 to 55 % of the products, fc-vs-fe to 260 images a second
bench 70 xl yes --modes train,tune --only '0$|fe$' --kernels 20
bench 60 xl-128 yes --modes train,tune --only '0$|fc-vs-fe$' --batches 128
bench 30 xl-sample yes --modes sample --only '2 '
# what the host's launches cost a large network, and the order of the sums
bench 45 xl-launched launched --modes train --only '0$'
bench 60 xl-exact yes --modes train,tune --only '0$|fc-vs-fe$' --exact
# the quick start, from nothing and tuned; twice the same command; without compiler and graph
train 60 default $steps
train 40 exact --steps $short --exact
train 40 again --steps $short --exact
train 40 plain --steps $short --no-compile
train 40 few $steps --recipe shapes-few --init_from "$out/default"
score 30 score-default
score 30 score-few
part 10 weights python3 - "$out"/*/model.safetensors <<'PYTHON'
import hashlib, sys
from safetensors.numpy import load_file
for path in sys.argv[1:]:
    weights = sorted(load_file(path).items())
    print(hashlib.sha256(b"".join(value.tobytes() for _, value in weights)).hexdigest(), path)
PYTHON
[ "$device" = cpu ] || part 200 tests python3 -m pytest -v --tb=short -m cuda

tail -n 80 "$out"/*.txt | grep -v '^$'
for run in default plain few; do grep -h images_per_s "$out/$run/log.jsonl" | tail -n 1; done
