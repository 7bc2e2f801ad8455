"""Render avatars: ten styles of DiceBear, one class each, drawn from seeds and small enough for a CPU.

    pip install dicebear-core==10.7.0 dicebear-styles==10.6.0 resvg-py==0.5.0
    python -m extras.avatars avatars64.npz                              # 5,000 pictures of each style
    python -m extras.avatars avatars64-test.npz --test --count 1000     # other seeds, for fid.py
    python train.py --recipe avatars

The file holds x uint8 (N, S, S, 3), y (N,) and the names of the classes. A picture depends only on its style
and seed, so the same package versions give the same bytes. To resume, run the same command again.

All ten styles are CC0 1.0 (public domain). Open Peeps is by Pablo Stanley, the others are by DiceBear.
"""
import functools
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from config import UserError, read_flags, setting
from engine import atomic_write, run

PACKAGES = ("dicebear-core", "dicebear-styles", "resvg-py")
STYLES = ("critters", "voxel-art", "planets", "open-peeps", "sprouts",
          "pixel-art", "moods", "voxel-bot", "landscape", "thumbs")
PASTEL = {"backgroundColor": ["b6e3f4", "c0aede", "d1d4f9", "ffd5dc", "ffdfbf", "c7ecd0"]}
ON_PASTEL = ("open-peeps", "sprouts", "pixel-art")      # the other styles keep their own backgrounds
BLOCK = 100                                             # pictures rendered and saved as one part


@dataclass
class Options:
    count: int = setting(5000, "pictures of each style", "after OUT.npz, the file to write", least=1)
    size: int = setting(64, "side in pixels", least=1)
    test: bool = setting(False, "use seeds that no training file has")
    workers: int = setting(os.cpu_count(), "processes", least=1)


@functools.cache
def load_style(name):
    from dicebear import Style
    return Style(json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8")))


def render(style, seed, size):
    """One picture, uint8 (S, S, 3). It is rendered at twice the size, which hides seams between faces."""
    import resvg_py
    from dicebear import Avatar
    avatar = Avatar(load_style(style), {"seed": seed} | (PASTEL if style in ON_PASTEL else {}))
    png = resvg_py.svg_to_bytes(svg_string=avatar.to_string(), width=2 * size, height=2 * size,
                                background="white", skip_system_fonts=True)
    x = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"), np.uint16)        # (2S, 2S, 3)
    return ((x.reshape(size, 2, size, 2, 3).sum((1, 3)) + 2) // 4).astype(np.uint8)     # (S, S, 3)


def write_arrays(path, save, **arrays):
    def write(temporary):
        with open(temporary, "wb") as file:     # given a name, numpy would append its own ending
            save(file, **arrays)
    atomic_write(path, write)


def render_block(job):
    path, style, seeds, size = job
    if not path.is_file():
        write_arrays(path, np.save, arr=np.stack([render(style, seed, size) for seed in seeds]))
    return len(seeds)


def make_file(out, count, size, test, workers):
    parts = Path(f"{out}.parts-{'-'.join(map(version, PACKAGES))}")
    parts.mkdir(parents=True, exist_ok=True)
    prefix, blocks = "test-" if test else "", [range(count)[k:k + BLOCK] for k in range(0, count, BLOCK)]
    jobs = [(parts / f"{style}-{prefix}{block[0]}-{block[-1]}-{size}.npy", style,
             [f"{prefix}{k}" for k in block], size) for style in STYLES for block in blocks]
    with (multiprocessing.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool,
          tqdm(total=len(STYLES) * count, unit="picture") as bar):
        for done in pool.imap_unordered(render_block, jobs):
            bar.update(done)
    write_arrays(out, np.savez_compressed, x=np.concatenate([np.load(path) for path, *_ in jobs]),
                 y=np.repeat(np.arange(len(STYLES)), count), names=np.array(STYLES))
    shutil.rmtree(parts)
    print(f"{out}: {len(STYLES) * count} pictures of {', '.join(STYLES)}")


def main(argv):
    out, *flags = argv if argv and not argv[0].startswith("-") else ["", *argv]
    options = Options(**read_flags(Options, flags, __doc__))
    if not out.endswith(".npz"):
        raise UserError(f"OUT must end in .npz, found {out!r}: python -m extras.avatars avatars64.npz")
    try:
        make_file(out, **vars(options))
    except ModuleNotFoundError as error:
        missing = error.name or "a package"
        raise UserError(f"{missing} is missing: pip install {' '.join(PACKAGES)}") from error


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
