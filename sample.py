"""Draw pictures from a trained model.

    python sample.py --steps 2                                  # the newest run, or the model that ships with the repository
    python sample.py --ckpt runs/shapes --steps 20 --classes star,heart
    python sample.py --steps 4 --trajectory yes                 # a strip of what the model sees after each step

Settings that are not given are those that the model's recipe recommends. Picture k is drawn from seed k alone, whatever
else is drawn with it.
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import load_model
from config import SamplerFlags, fail, read_flags
from data import class_number, contact_sheet, noise_like_seed
from sampler import count_nfe, sample, time_grid
from train import autocast, pick_device, pick_dtype


@dataclass
class Options(SamplerFlags):
    ckpt: str = ""                              # a model.safetensors or the folder of a run; empty: the newest in runs/, else assets/
    out: str = "samples.png"                    # the picture to write
    classes: str = ""                           # names or numbers, with commas, taken in turn; empty: all of them
    seeds: str = ""                             # such as 0-63 or 3,5,8; empty: 0 to num - 1
    num: int = 64                               # how many pictures
    trajectory: bool = False                    # yes: one row a picture, one column a step: the data as the model sees them then
    batch_size: int = 256                       # pictures at a time
    device: str = "auto"                        # cuda, mps or cpu
    dtype: str = "auto"                         # bfloat16 or float32


def newest_model():
    """The model saved last under runs/, else the one that ships in assets/."""
    runs = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    return runs[-1] if runs else Path(__file__).parent / "assets/shapes-few.safetensors"


def read_seeds(text, num):
    """Seeds from "0-63" or "3,5,8", else 0..num-1."""
    try:
        parts = [part.split("-") for part in text.split(",")] if text else [["0", str(num - 1)]]
        seeds = [k for part in parts for k in range(int(part[0]), int(part[-1]) + 1)]
    except ValueError:
        seeds = []
    if not seeds:
        raise ValueError(f"no seeds in {text or f'num {num}'!r}; expected such as 0-63 or 3,5,8, or --num 64")
    return seeds


def main(options):
    path = Path(options.ckpt) if options.ckpt else newest_model()
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    net, config, names = load_model(path, device)
    settings = config.sampler(**options.given())
    seeds = read_seeds(options.seeds, options.num)
    if options.batch_size < 1:
        raise ValueError(f"batch_size {options.batch_size} must be at least 1")
    if options.classes and not names:
        raise ValueError(f"{path} was trained without classes: leave --classes out")
    kinds = [class_number(word, names) for word in options.classes.split(",")] if options.classes else list(range(max(1, len(names))))
    labels = [kinds[k % len(kinds)] for k in range(len(seeds))]
    if Path(options.out).suffix.lower() not in (".png", ".jpg", ".webp"):
        raise ValueError(f"out {options.out!r} must end in .png, .jpg or .webp")
    times = time_grid(settings["steps"], settings["schedule"], settings["gap"], settings["order"])
    nfe = count_nfe(times, settings["transport"], settings["order"], settings["cfg_scale"], settings["cfg_interval"])

    shape, pictures, seen = (net.in_channels, net.input_size, net.input_size), [], []
    start, bar = time.perf_counter(), tqdm(total=len(seeds), unit="image", disable=len(seeds) <= options.batch_size and nfe < 20)
    for first in range(0, len(seeds), options.batch_size):
        part, strip = seeds[first:first + options.batch_size], []
        y = torch.tensor(labels[first:first + options.batch_size], device=device)
        with autocast(device, dtype):
            x = sample(net, noise_like_seed(part, shape).to(device), y, **settings, noise=lambda i: noise_like_seed(part, shape, i).to(device),
                       on_step=lambda i, t, x_hat: strip.append(x_hat.cpu()))
        pictures.append(x.cpu())
        seen.append(torch.stack(strip, 1))                                                           # (B, steps, C, S, S)
        bar.update(len(part))
    bar.close()
    seconds = time.perf_counter() - start

    if options.trajectory:
        page = contact_sheet(torch.cat(seen).flatten(0, 1), columns=seen[0].shape[1])
    else:
        page = contact_sheet(torch.cat(pictures), columns=len(kinds) if 4 <= len(kinds) <= 12 else 8)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    page.save(options.out)
    print(f"{options.out}: {len(seeds)} pictures from {path}, {settings['steps']} steps, NFE {nfe} each, {len(seeds) / seconds:.1f} images/s")


if __name__ == "__main__":
    try:
        main(Options(**read_flags(Options, sys.argv[1:], __doc__)))
    except ValueError as error:
        fail(error)
