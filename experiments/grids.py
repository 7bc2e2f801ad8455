"""One picture of what few and many steps give: the same seeds and classes in every block, with a label.

    python experiments/grids.py --few runs/shapes32-few --many runs/shapes32 --out assets/steps.png
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import fail, read_flags
from data import contact_sheet
from machine import pick_device
from sample import generate, open_model


@dataclass
class Options:
    few: str = ""                               # a few-step model: drawn at 1, 2 and 4 steps
    one: str = ""                               # another for 1 step, if there is one
    many: str = ""                              # the many-step model that it came from: drawn at 40
    out: str = "steps.png"                      # picture to write
    columns: int = 8                            # pictures in a row of a block
    rows: int = 4                               # and rows


def main(options):
    blocks = []
    for path, steps in ((options.one or options.few, 1), (options.few, 2), (options.few, 4), (options.many, 40)):
        model = open_model(path, pick_device("cpu"))
        x = torch.cat([x for _, x, _ in generate(model, range(options.columns * options.rows), 256, steps=steps)])
        blocks.append((f"{steps} step{'s' * (steps > 1)}", contact_sheet(x, options.columns, side=64)))
    width, height = blocks[0][1].size
    page = Image.new("RGB", (2 * width + 24, 2 * (height + 22) + 12), "white")
    for k, (title, sheet) in enumerate(blocks):
        left, top = k % 2 * (width + 24), k // 2 * (height + 34)
        ImageDraw.Draw(page).text((left + 2, top + 4), title, fill="black")
        page.paste(sheet, (left, top + 22))
    page.save(options.out)
    print(f"{options.out}: {len(blocks)} blocks of the same {options.columns * options.rows} seeds")


if __name__ == "__main__":
    try:
        main(Options(**read_flags(Options, sys.argv[1:], __doc__)))
    except ValueError as error:
        fail(error)
