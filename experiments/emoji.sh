#!/usr/bin/env bash
# Emoji at 64 pixels on one GPU: train for MINUTES, tune to two steps for an eighth as many steps, draw.
#
#     npm pack emoji-datasource-google && tar xf emoji-datasource-google-*.tgz    # makes package/, without a GPU
#     bash experiments/emoji.sh                                                   # emoji64.npz and runs/emoji
#     DEVICE=cpu MODEL=TiT-XXS/8 BATCH=32 MINUTES=0.3 bash experiments/emoji.sh   # a try, on any machine
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/emoji device=${DEVICE:-cuda} minutes=${MINUTES:-4}
flags="--data npz:emoji64.npz --model ${MODEL:-TiT-S/4} --batch_size ${BATCH:-256} --device $device"
mkdir -p "$out"
# 3,786 images, a class a category: without a network the npz can travel in place of the package
[ -f emoji64.npz ] || python3 - <<'PYTHON'
import json
from pathlib import Path

import numpy as np
from PIL import Image

category, x, y, root = {}, [], [], Path("package")
for row in json.loads((root / "emoji.json").read_text()):
    for version in (row, *row.get("skin_variations", {}).values()):
        category[version["image"]] = row["category"]
names = sorted(set(category.values()))
for path in sorted((root / "img/google/64").glob("*.png")):
    image = Image.open(path).convert("RGBA")
    x.append(np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")))
    y.append(names.index(category[path.name]))
np.savez_compressed("emoji64.npz", x=np.stack(x), y=np.array(y))
print(f"emoji64.npz: {len(x)} images of {', '.join(names)}")
PYTHON

train() { python3 train.py --recipe folder $flags --lr 3e-3 --log_every 10 --save_every 5000 --fresh "$@"; }
train --out "$out/speed" --steps "${TRY:-100}"          # compiles, and says how many steps a minute has
steps=$(python3 - "$minutes" "$out/speed/log.jsonl" "${BATCH:-256}" <<'PYTHON'
import json, sys
minutes, path, batch = float(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rates = [line["images_per_s"] for line in map(json.loads, open(path)) if "images_per_s" in line]
print(max(8, int(60 * minutes * rates[-1] / batch)))
PYTHON
)
train --out "$out/many" --steps "$steps"
python3 train.py --recipe folder-few $flags --fresh --init_from "$out/many" --out "$out/few" --steps $((steps / 8)) \
  --optimizer muon --lr 3e-3 --warmup 100 --ema 0.995 --dt 0.1 --rho 0.5 --gap 0.001,0.75 --log_every 10
draw() { python3 sample.py --ckpt "$out/$1" --steps "$2" --num 40 --out "$out/$2.png" --device "$device"; }
draw many 40
for calls in 4 2 1; do draw few $calls; done
