"""Draw pictures from a trained model.

    python sample.py --steps 2                                  # the newest run, or the model that ships with the repository
    python sample.py --ckpt runs/shapes --steps 20 --classes star,heart
    python sample.py --steps 4 --trajectory yes                 # a strip of what the model sees after each step
    python sample.py --recipe repae --ckpt hf://USER/REPO/FILE.pt            # somebody else's model, with the recipe's settings
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --out samples.npz       # many, for fid.py; the same command resumes

The two dashes keep recent torchruns from taking --num for their own --numa-binding.

Settings that are not given are those that the model's recipe recommends. Picture k is drawn from seed k alone, whatever
else is drawn with it.
"""
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import load_model, push, write_safely
from config import Config, SamplerFlags, fail, read_flags
from data import class_number, contact_sheet, noise_like_seed, to_uint8
from latents import Autoencoder
from machine import autocast, deal, pick_device, pick_dtype, place, say
from sampler import count_nfe, sample, time_grid


@dataclass
class Options(SamplerFlags):
    ckpt: str = ""                              # a model file, the folder of a run, or hf://USER/REPO[/FILE]; empty: the newest in runs/, else assets/
    recipe: str = ""                            # take network, transport and sampler settings from this row of config.RECIPES
    vae: str = ""                               # for models of latents: an autoencoder as for latents.py; empty: the recipe's
    out: str = "samples.png"                    # a page to look at (png, jpg, webp), or all pictures as uint8 with labels (npz)
    classes: str = ""                           # names or numbers, with commas, taken in turn; empty: all of them
    seeds: str = ""                             # such as 0-63 or 3,5,8; empty: 0 to num - 1
    num: int = 64                               # how many pictures
    trajectory: bool = False                    # yes: one row a picture, one column a step: the data as the model sees them then
    push: str = ""                              # also put the model, with this page and command, on the hub as USER/REPO
    batch_size: int = 256                       # pictures at a time
    device: str = "auto"                        # cuda, mps or cpu
    dtype: str = "auto"                         # bfloat16 or float32


# ---- a model that draws pictures ----------------------------------------------------------------------------------

class Model(NamedTuple):
    net: torch.nn.Module
    config: Config
    names: list                     # of the classes
    device: torch.device
    dtype: torch.dtype
    decode: object                  # what makes pictures of the network's data: an Autoencoder's decode, or nothing

    @property
    def shape(self):
        return self.net.in_channels, self.net.input_size, self.net.input_size


def open_model(path, device, dtype="auto", recipe="", vae=""):
    """A Model from what --ckpt may name. ValueError says what is wrong with it."""
    net, config, names = load_model(path, device, recipe)
    vae = vae or config.vae
    autoencoder = Autoencoder(vae, config.latent_mean, config.latent_std).to(device) if vae else None
    return Model(net, config, names, device, pick_dtype(dtype, device), autoencoder and autoencoder.decode)


def generate(model, seeds, batch_size, rank=0, world=1, kinds=None, on_step=None, skip=(), **given):
    """(first, x, y) of this process's batches: pictures x (B, C, S, S) in [-1, 1] on the CPU and classes y (B,); picture k is that
    of seeds[k] and of kinds[k % len(kinds)], by default of all classes in turn (by the number of the seed)."""
    settings, net = model.config.sampler(**given), model.net
    for first in deal(len(seeds), batch_size, rank, world):
        if first in skip:
            continue
        part = list(seeds[first:first + batch_size])
        labels = [kinds[k % len(kinds)] for k in range(first, first + len(part))] if kinds else [k % max(1, net.num_classes) for k in part]
        y = torch.tensor(labels, device=model.device)
        with autocast(model.device, model.dtype):
            x = sample(net, noise_like_seed(part, model.shape).to(model.device), y, **settings, on_step=on_step,
                       noise=lambda i, part=part: noise_like_seed(part, model.shape, i).to(model.device))
        yield first, (model.decode(x) if model.decode else x).cpu(), y.cpu()


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


# ---- many pictures into one file ----------------------------------------------------------------------------------

def save_array(path, **arrays):
    """An npz file that is whole or not there."""
    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
    write_safely(path, write)


def write_npz(out, model, seeds, options, kinds, settings):
    """All pictures (arr_0: uint8, N H W C, as ADM and fid.py read them) and labels into one npz, batch by batch: what an
    interrupted run has drawn is kept beside `out` and not drawn again."""
    weights = hashlib.sha256(b"".join(v.cpu().float().numpy().tobytes() for v in model.net.state_dict().values())).hexdigest()
    said = json.dumps([weights, settings, seeds, kinds, options.batch_size, str(model.dtype), options.vae], default=str)
    parts, (rank, world) = Path(f"{out}.parts-{hashlib.sha256(said.encode()).hexdigest()[:8]}"), place()
    parts.mkdir(parents=True, exist_ok=True)
    part = lambda first: parts / f"{first:09d}.npz"
    done = {first for first in deal(len(seeds), options.batch_size, 0, 1) if part(first).is_file()}
    bar = tqdm(total=len(seeds), initial=min(len(seeds), len(done) * options.batch_size), unit="image", disable=rank > 0)
    for first, x, y in generate(model, seeds, options.batch_size, rank, world, kinds, skip=done, **options.given()):
        save_array(part(first), x=to_uint8(x), y=y.numpy())
        bar.update(min(len(x) * world, bar.total - bar.n))
    bar.close()
    if world > 1:
        dist.barrier()
    if rank == 0:
        x, y = None, np.empty(len(seeds), np.int64)
        for first in deal(len(seeds), options.batch_size, 0, 1):
            with np.load(part(first)) as file:
                x = np.empty((len(seeds), *file["x"].shape[1:]), np.uint8) if x is None else x
                x[first:first + options.batch_size], y[first:first + options.batch_size] = file["x"], file["y"]
        save_array(out, arr_0=x, labels=y, seeds=np.array(seeds))
        for file in parts.iterdir():
            file.unlink()
        parts.rmdir()


def main(options):
    rank, world = place()
    suffix = Path(options.out).suffix.lower()
    if suffix not in (".png", ".jpg", ".webp", ".npz"):
        raise ValueError(f"out {options.out!r} must end in .png, .jpg or .webp (a page to look at) or .npz (all pictures)")
    if options.trajectory and suffix == ".npz":
        raise ValueError(f"a trajectory is a page to look at, and {options.out} is an array: use --out samples.png")
    if world > 1 and suffix != ".npz":
        raise ValueError(f"several processes draw many pictures, and {options.out} is one page: use --out samples.npz")
    if options.batch_size < 1:
        raise ValueError(f"batch_size {options.batch_size} must be at least 1")
    device = pick_device(options.device)
    path = options.ckpt or newest_model()
    model = open_model(path, device, options.dtype, options.recipe, options.vae)
    names, settings, seeds = model.names, model.config.sampler(**options.given()), read_seeds(options.seeds, options.num)
    if options.classes and not names:
        raise ValueError(f"{path} was trained without classes: leave --classes out")
    kinds = [class_number(word, names) for word in options.classes.split(",")] if options.classes else None
    times = time_grid(settings["steps"], settings["schedule"], settings["gap"], settings["order"])
    nfe = count_nfe(times, settings["transport"], settings["order"], settings["cfg_scale"], settings["cfg_interval"])
    if world > 1:
        dist.init_process_group("gloo")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    if suffix == ".npz":
        write_npz(options.out, model, seeds, options, kinds, settings)
    else:
        pictures, seen = [], []
        bar = tqdm(total=len(seeds), unit="image", disable=len(seeds) <= options.batch_size and nfe < 20)
        for _, x, _ in generate(model, seeds, options.batch_size, kinds=kinds, on_step=lambda i, t, x_hat: seen.append(x_hat.cpu()), **options.given()):
            pictures.append(x)
            bar.update(len(x))
        bar.close()
        columns = len(kinds or names) if 4 <= len(kinds or names) <= 12 else 8
        if options.trajectory:      # the raw predictions came step by step, batch after batch
            columns = len(seen) // len(pictures)
            strips = [torch.stack(seen[k * columns:(k + 1) * columns], 1).flatten(0, 1) for k in range(len(pictures))]
            pictures = [model.decode(strip.to(device)).cpu() if model.decode else strip for strip in strips]
        contact_sheet(torch.cat(pictures), columns).save(options.out)
    seconds = time.perf_counter() - start
    say(f"{options.out}: {len(seeds)} pictures from {path}, {settings['steps']} steps, NFE {nfe} each, {len(seeds) / seconds:.1f} images/s")
    if options.push and rank == 0:
        flags = " ".join(f"--{name} {','.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in options.given().items() if v is not None)
        print(push(options.push, model.net, model.config, names, options.out if suffix != ".npz" else None, flags))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(Options(**read_flags(Options, sys.argv[1:], __doc__)))
    except ValueError as error:
        fail(error)
