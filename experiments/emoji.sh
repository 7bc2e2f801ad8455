#!/usr/bin/env bash
# Emoji at 64 pixels on one GPU: train for STEPS steps, tune to two network calls in an eighth of them, draw.
#
#     npm pack emoji-datasource-google && tar xf emoji-datasource-google-*.tgz    # makes package/, without a GPU
#     bash experiments/emoji.sh                                                   # emoji64.npz and runs/emoji
#     DEVICE=cpu MODEL=TiT-XXS/8 BATCH=32 STEPS=16 bash experiments/emoji.sh      # a try, on any machine
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/emoji device=${DEVICE:-cuda} steps=${STEPS:-4000}
flags="--data npz:emoji64.npz --model ${MODEL:-TiT-S/4} --batch_size ${BATCH:-256} --device $device --fresh"
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

python3 train.py --recipe folder $flags --out "$out/many" --steps "$steps" --lr 3e-3
python3 train.py --recipe folder-few $flags --out "$out/few" --steps $((steps / 8)) --init_from "$out/many" \
  --optimizer muon --lr 3e-3 --warmup 100 --ema 0.995 --dt 0.1 --rho 0.5 --gap 0.001,0.75
python3 experiments/grids.py --few "$out/few" --many "$out/many" --columns 10 --rows 3 --device "$device" \
  --out "$out/emoji.png"
