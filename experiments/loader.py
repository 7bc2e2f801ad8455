"""Do images arrive faster than a training step uses them? All rates are measured in one run.

    python experiments/loader.py            # jpg files of 32 to 64 pixels; TiT-S/2 at 32 pixels, batch 64

First pass: worker processes decode, crop and resize every file, as for the first start on a folder. Cache:
the batches of train.py, which later starts read from the memory-mapped file. Step: train.py's at lam 0 on
images that are there, with as many threads as other programs leave idle.
"""
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import timed, train_step
from checkpoint import build
from config import Config, read_flags, setting
from data import open_dataset
from engine import pick_device, pick_dtype, run, spare_threads
from images import find_classes, read_many, read_square
from train import open_batches

SIZE = 32


@dataclass
class Options:
    images: int = setting(20_000, "jpg files, written into a temporary folder")
    workers: int = setting(4, "processes that read; train.py has 4 on a GPU")
    model: str = setting("TiT-S/2", "as for train.py")
    batch: int = setting(64, "images in a batch")
    seconds: float = setting(10.0, "of measuring the cache and the step")
    compile: bool = setting(True, "the step; --no-compile")
    device: str = setting("auto", "cuda, mps or cpu")


def write_jpgs(root, count):
    """Smooth random images of 32 to 64 pixels, in ten classes."""
    rng = np.random.default_rng(0)
    for k in range(count):
        (root / str(k % 10)).mkdir(exist_ok=True)
        page = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        page.resize([int(rng.integers(32, 65))] * 2).save(root / str(k % 10) / f"{k}.jpg", quality=90)


def first_pass(root, workers):
    """Images per second, decoded to uint8 (3, SIZE, SIZE)."""
    files, read = [root / name for name, *_ in find_classes(root).files], lambda file: read_square(file, SIZE)
    start = time.perf_counter()
    done = sum(len(images) for images, _ in read_many(files, read, workers=workers))
    return done / (time.perf_counter() - start)


def from_cache(root, cache, options):
    """Images per second of train.py's batches x, y, once the workers have started."""
    data = open_dataset(f"folder:{root}", SIZE, cache=cache)
    config = Config(batch_size=options.batch, steps=10**9)
    batches = open_batches(data, config, 1, 0, on_gpu=False, workers=options.workers)
    next(batches)
    start, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < options.seconds:
        done += len(next(batches)[0])
    return done / passed


def main(options):
    device = pick_device(options.device)
    torch.set_num_threads(spare_threads() or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        root.mkdir()
        write_jpgs(root, options.images)
        rates = {"first pass": first_pass(root, options.workers),
                 "cache": from_cache(root, folder, options)}
    config, dtype = Config(model=options.model), pick_dtype("auto", device)
    net = build(config, (3, SIZE, SIZE), 10).to(device)
    step, _ = train_step(config, net, options.batch, device, dtype, "yes" if options.compile else "no")
    need = options.batch / timed(step, device, options.seconds)[0]
    print(f"{options.workers} workers, {options.images} jpg files; {options.model} on {device}, "
          f"{str(dtype)[6:]}, threads {torch.get_num_threads()}, batch {options.batch}: a step uses "
          f"{need:.3g} images/s")
    for name, rate in rates.items():
        print(f"{name}: {rate:.0f} images/s, {rate / need:.3g} times a step's need")


if __name__ == "__main__":
    run(lambda: main(Options(**read_flags(Options, sys.argv[1:], __doc__))))
