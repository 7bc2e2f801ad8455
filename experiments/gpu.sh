#!/usr/bin/env bash
# What RESULTS.md says about GPUs, on one card, in under 8 minutes: each part has a time limit, and a part that
# fails or is cut does not stop the next.
#
#     bash experiments/gpu.sh                  # everything into runs/gpu/*.txt, shown at the end
#     DEVICE=cpu bash experiments/gpu.sh       # a try with tiny sizes, on any machine
set -uo pipefail
cd "$(dirname "$0")/.."
out=runs/gpu device=${DEVICE:-cuda}
rm -rf "$out" && mkdir -p "$out"
xl="--model TiT-XL/1 --size 16 --channels 32 --classes 1000 --no-x_pred --seconds 2" steps=400
small="--model TiT-XXS/8 --modes train --only Muon --seconds 1"
if [ "$device" = cpu ]; then
  xl="--model TiT-XXS/1 --size 4 --channels 4 --classes 10 --no-x_pred --seconds 0.1" steps=20
fi
part() {    # SECONDS NAME COMMAND...: its output, its status and how long it took
  local begun=$SECONDS
  timeout -s INT -k 10 "$1" "${@:3}" > "$out/$2.txt" 2> "$out/$2.err"
  echo "status $?, $((SECONDS - begun)) s of $1" >> "$out/$2.txt"
}
bench() { part "$1" "$2" python3 experiments/bench.py --device "$device" --compiles "$3" "${@:4}"; }
train() { part "$1" "$2" python3 train.py --device "$device" --fresh --out "$out/$2" --steps $steps "${@:3}"; }

# XL, for the published code's figures: lam 0 to 55 % of the products, fc-vs-fe to 260 images a second
bench 70 xl-train yes $xl --modes train --only '0$|fe$' --kernels 20
bench 45 xl-tune yes $xl --modes tune --only 'fc-vs-fe$'
bench 30 xl-sample yes $xl --modes sample --only "2 "
# the price of exactness, and what the host's launches cost a large network
CUBLAS_WORKSPACE_CONFIG='' bench 40 xl-any-order yes $xl --modes train --only 'fe$'
bench 40 xl-graphs graphs $xl --modes train --only 'fe$'
# the default recipe's network: launches, CUDA graphs (on by default from 1.5 times on)
bench 25 small yes $small
bench 30 small-graphs graphs $small
# the run itself: time to the first step, images a second; the same command again gives the same weights. A CPU has
# no graphs: there those parts end with status 2
train 40 default
train 25 again
train 25 graph --graph
part 10 weights python3 - "$out"/*/model.safetensors <<'PYTHON'
import hashlib, sys
from safetensors.numpy import load_file
for path in sys.argv[1:]:
    weights = sorted(load_file(path).items())
    print(hashlib.sha256(b"".join(value.tobytes() for _, value in weights)).hexdigest(), path)
PYTHON
ls "$out"/*/ | grep state_ >> "$out/weights.txt"        # a run that was cut is at another step
[ "$device" = cpu ] || part 100 tests python3 -m pytest -v --tb=short -m cuda

tail -n 60 "$out"/*.txt | grep -v '^$'
for run in default graph; do grep -h images_per_s "$out/$run/log.jsonl" | tail -n 1; done
