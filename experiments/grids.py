"""What few and many network calls give: the same seeds and classes in every block, with a label.

    python experiments/grids.py --few runs/shapes32-few --many runs/shapes32 --out steps.png
    python experiments/grids.py --few runs/shapes32-few --many runs/shapes32 --columns 12 --rows 1 --across 1
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, read_flags, setting
from data import image_grid
from engine import pick_device, run
from sample import generate, open_pipeline

GAP, TITLE = 24, 24             # pixels between two blocks, and above each of them


@dataclass
class Options:
    few: str = setting("", "a few-step model: drawn at 1, 2 and 4 steps")
    one: str = setting("", "another one for 1 step, if there is one")
    many: str = setting("", "the many-step model that it was tuned from: drawn at 40")
    out: str = setting("steps.png", "page to write")
    columns: int = setting(8, "images in a row of a block")
    rows: int = setting(4, "rows of a block")
    across: int = setting(2, "blocks beside each other")
    device: str = setting("cpu", "cuda, mps or cpu")


def main(options):
    if not options.few or not options.many:
        raise UserError("which models? give --few and --many, such as runs/shapes32-few and runs/shapes32")
    seeds, blocks = range(options.columns * options.rows), []
    one, few, many = options.one or options.few, options.few, options.many
    for path, steps in ((one, 1), (few, 2), (few, 4), (many, 40)):
        model = open_pipeline(path, pick_device(options.device))
        x = torch.cat([x for _, x, _ in generate(model, seeds, 256, steps=steps)])
        calls = model.nfe(steps=steps)
        blocks.append((f"{calls} network call{'s' * (calls > 1)}", image_grid(x, options.columns)))
    width, height = blocks[0][1].size
    down = -(-len(blocks) // options.across)
    size = options.across * (width + GAP) - GAP, down * (height + TITLE + GAP // 2) - GAP // 2
    page, font = Image.new("RGB", size, "white"), ImageFont.load_default(15)
    for k, (title, block) in enumerate(blocks):
        left, top = k % options.across * (width + GAP), k // options.across * (height + TITLE + GAP // 2)
        ImageDraw.Draw(page).text((left + 2, top + 2), title, fill="black", font=font)
        page.paste(block, (left, top + TITLE))
    page.save(options.out)
    print(f"{options.out}: {len(blocks)} blocks of the same {len(seeds)} seeds")


if __name__ == "__main__":
    run(lambda: main(Options(**read_flags(Options, sys.argv[1:], __doc__))))
