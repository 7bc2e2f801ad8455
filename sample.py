"""Draw images from a trained model.

    python sample.py --steps 2                              # the newest run, or the model that ships
    python sample.py --ckpt runs/shapes --steps 20 --classes star,heart
    python sample.py --steps 4 --trajectory                 # what the model sees after each step
    python sample.py --ckpt runs/shapes --out film.gif      # the same as a film
    python sample.py --recipe repae --ckpt hf://USER/REPO/FILE.pt       # somebody else's model
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --out samples.npz      # many, for fid.py

Settings that are not given are the model's own. Image k is drawn from seed k alone. An interrupted run goes
on by the same command. The two dashes keep torchrun from taking --num for a flag of its own.
"""
from dataclasses import dataclass

from config import Config, SamplerFlags, command_line, read_flags, setting, text_of


@dataclass
class Options(SamplerFlags):
    ckpt: str = setting("", "a run, a file or hf://USER/REPO[/FILE]; empty: the newest in runs/", "what")
    recipe: str = setting("", "take network, transport and sampler settings from this recipe")
    vae: str = setting("", "for latents: an autoencoder as for latents.py; empty: the model's own")
    out: str = setting("samples.png", "a page (png jpg webp), film of the steps (gif), or uint8 arrays (npz)")
    classes: str = setting("", "names or numbers, with commas, taken in turn; empty: all of them")
    seeds: str = setting("", "such as 0-63 or 3,5,8; empty: 0 to num - 1")
    num: int | None = setting(None, "how many images [8 rows; of a trajectory 12, of a film 4]", least=1)
    beside: str = setting("", "another model, to the right in the film")
    trajectory: bool = setting(False, "a row an image, a column a step: the data as the model sees them then")
    push: str = setting("", "also put the model, with this page and command, on the hub as USER/REPO")
    batch_size: int = setting(256, "images at a time", least=1)
    device: str = setting("auto", "cuda, mps or cpu")
    dtype: str = setting("auto", "bfloat16 or float32")


if __name__ == "__main__":      # before torch is loaded: -h and a mistyped flag answer at once
    OPTIONS = command_line(lambda argv: Options(**read_flags(Options, argv, __doc__)))

import hashlib
import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from checkpoint import as_one_error, atomic_write, load_model, push
from data import class_number, image_grid, noise_like_seed, to_uint8
from engine import (Graphed, autocast, from_rank0, init_distributed, leave_distributed, pick_device,
                    pick_dtype, print0, rank_and_world, rank_batches, run)
from latents import Autoencoder
from sampler import count_nfe, sample, time_grid

# The largest side of each format in pixels; an npz has none.
LARGEST = {".png": 100_000, ".jpg": 65_000, ".webp": 16_000, ".gif": 4_000, ".npz": float("inf")}


# ---- a model that draws -------------------------------------------------------------------------------

class Model(NamedTuple):
    net: torch.nn.Module
    config: Config
    names: list                     # of the classes
    device: torch.device
    dtype: torch.dtype
    decode: object = None           # makes images of latents: an Autoencoder's decode

    @property
    def shape(self):
        return self.net.in_channels, self.net.input_size, self.net.input_size

    def nfe(self, **given):
        """Network evaluations an image."""
        s = {"order": 1, **self.config.sampler(**given)}
        times = time_grid(s["steps"], s["schedule"], s["gap"], s["order"])
        return count_nfe(times, s["transport"], s["order"], s["cfg_scale"], s["cfg_interval"])

    def to_images(self, x):
        """Images on the CPU, of what the sampler returns."""
        return (self.decode(x) if self.decode else x).cpu()


def open_model(path, device, dtype="auto", recipe="", vae="", graph=False):
    """A Model from what --ckpt may name; graph: on a GPU its network is one CUDA graph, for many calls
    without gradient, unless it was trained with --no-compile. ValueError: what is wrong."""
    net, config, names = load_model(path, device, recipe)
    if graph and device.type == "cuda" and config.compile is not False:
        net.forward = Graphed(net.forward)
    vae, decode = vae or config.vae, None
    if vae:
        decode = Autoencoder(vae, config.latent_mean, config.latent_std).to(device).decode
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    dtype = from_rank0(lambda: pick_dtype(dtype, device), group)        # a try, which might end otherwise
    return Model(net, config, names, device, dtype, decode)


def generate(model, seeds, batch_size, rank=0, world=1, classes=None, on_step=None, skip=(), **given):
    """(first, x, y) of this process's batches: images x (B, C, S, S) in [-1, 1] on the CPU, classes y (B,).

    Image k is of seeds[k] and classes[k % len(classes)], by default of class seeds[k] modulo all.
    given: settings of the sampler. skip: batches, by their first index.
    """
    settings, count = model.config.sampler(**given), max(1, model.net.num_classes)
    for first in rank_batches(len(seeds), batch_size, rank, world):
        if first in skip:
            continue
        batch = list(seeds[first:first + batch_size])
        labels = [seed % count for seed in batch]
        if classes:
            labels = [classes[k % len(classes)] for k in range(first, first + len(batch))]
        y, noise = torch.tensor(labels, device=model.device), partial(noise_like_seed, batch, model.shape)
        with autocast(model.device, model.dtype):
            x = sample(model.net, noise().to(model.device), y, **settings, noise=noise, on_step=on_step)
        if not x.isfinite().all():
            raise ValueError(f"an image of seeds {batch[0]}..{batch[-1]} is not finite: "
                             "the model has diverged, or wants --dtype float32")
        yield first, model.to_images(x), y.cpu()


# ---- a page, or many ----------------------------------------------------------------------------------

def check_out(out, height):
    """ValueError if `out` cannot be written, or a page of this height in pixels is too large for it."""
    folder = Path(out).parent
    with as_one_error(f"cannot write into {folder.resolve()}", "give another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission")
    if height > LARGEST[Path(out).suffix.lower()]:
        raise ValueError(f"a page of {height} pixels is too high for {out}: use --out samples.npz")


def draw_page(model, seeds, options, classes, columns, titles):
    images, seen = [], {}               # seen: the title of a step -> what the model sees then
    see = lambda i, t, x_hat: seen.update({f"{i + 1}: t {t:.2f}": x_hat})
    on_step = see if options.trajectory else None
    batches = generate(model, seeds, options.batch_size, classes=classes, on_step=on_step, **options.given())
    total = -(-len(seeds) // options.batch_size)
    for _, x, _ in tqdm(batches, total=total, unit="batch", disable=total == 1):
        if options.trajectory:
            columns, titles = len(seen), list(seen)
            x = model.to_images(torch.stack(list(seen.values()), 1).flatten(0, 1))  # (B * columns, C, S, S)
            seen.clear()
        images.append(x)
    image_grid(torch.cat(images), columns, titles=titles).save(options.out)


def draw_film(models, seeds, options, classes, columns):
    """The noise, then what each model sees after each of its calls, side by side."""
    films = []
    for model in models:
        frames = [noise_like_seed(seeds, model.shape).to(model.device)]
        see = lambda i, t, x_hat, frames=frames: frames.append(x_hat)
        next(generate(model, seeds, len(seeds), classes=classes, on_step=see, **options.given()))
        titles = [f"{k} of {len(frames) - 1}" for k in range(len(frames))]
        films.append([image_grid(model.to_images(x), columns, titles=["call", title])
                      for x, title in zip(frames, titles)])
    width, height = films[0][0].size
    pages = [Image.new("RGB", ((width + 24) * len(films) - 24, height), "white") for _ in max(films, key=len)]
    for k, film in enumerate(films):
        for i, page in enumerate(pages):
            page.paste(film[min(i, len(film) - 1)], (k * (width + 24), 0))
    pages[0].save(options.out, save_all=True, append_images=pages[1:], loop=0,
                  duration=[800, *[100] * (len(pages) - 2), 3000])


def save_arrays(path, **arrays):
    """An npz file that is whole or not there."""
    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
    atomic_write(path, write)


def draw_npz(model, seeds, options, classes):
    """All images (arr_0: uint8, N H W C) and labels in one npz, as ADM and fid.py read them. Until all are
    there each batch is kept beside it, so that an interrupted run does not draw it again."""
    (rank, world), size = rank_and_world(), options.batch_size
    decides = [model.config.sampler(**options.given()), seeds, classes, size, str(model.dtype), options.vae]
    fingerprint = hashlib.sha256(json.dumps(decides).encode())
    for value in model.net.state_dict().values():
        fingerprint.update(value.cpu().float().numpy().tobytes())
    parts = Path(f"{options.out}.parts-{fingerprint.hexdigest()[:8]}")
    parts.mkdir(parents=True, exist_ok=True)
    files = {first: parts / f"{first:09d}.npz" for first in rank_batches(len(seeds), size, 0, 1)}
    done = {first for first, file in files.items() if file.is_file()}
    batches = generate(model, seeds, size, rank, world, classes, skip=done, **options.given())
    mine = len(set(rank_batches(len(seeds), size, rank, world)) - done)
    for first, x, y in tqdm(batches, total=mine, unit="batch", disable=rank > 0):
        save_arrays(files[first], x=to_uint8(x).permute(0, 2, 3, 1).numpy(), y=y.numpy())
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        batches = [dict(np.load(file)) for file in files.values()]
        x, y = (np.concatenate([batch[name] for batch in batches]) for name in "xy")
        save_arrays(options.out, arr_0=x, labels=y, seeds=np.array(seeds))
        shutil.rmtree(parts)


# ---- the command line ---------------------------------------------------------------------------------

def newest_model(recipe):
    """The model of a recipe's run; without one the model saved last under runs/, or the one that ships."""
    if recipe:
        return f"runs/{recipe}"
    runs = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    return runs[-1] if runs else Path(__file__).parent / "assets/fashion-few.safetensors"


def read_seeds(text):
    """Seeds from "0-63" or "3,5,8"."""
    try:
        parts = [part.split("-") for part in text.split(",")]
        seeds = [seed for part in parts for seed in range(int(part[0]), int(part[-1]) + 1)]
    except ValueError:
        seeds = []
    if not seeds or max(seeds) >= 2**63:
        raise ValueError(f"no seeds in {text!r}; expected such as 0-63 or 3,5,8")
    return seeds


def main(options):
    (rank, world), suffix = rank_and_world(), Path(options.out).suffix.lower()
    if suffix not in LARGEST:
        raise ValueError(f"out {options.out!r} must end in one of {', '.join(LARGEST)}")
    if options.trajectory and suffix in (".gif", ".npz"):
        raise ValueError("a trajectory is a page: use --out samples.png")
    if options.beside and suffix != ".gif":
        raise ValueError("two models are beside each other in a film: use --out film.gif")
    if world > 1 and suffix != ".npz":
        raise ValueError("several processes draw arrays, not a page: use --out samples.npz")
    init_distributed()
    path = options.ckpt or newest_model(options.recipe)
    open_path = lambda path: open_model(path, pick_device(options.device), options.dtype, options.recipe,
                                        options.vae, graph=True)
    model = open_path(path)
    if options.classes and not model.names:
        raise ValueError(f"{path} was trained without classes: leave --classes out")
    classes = [class_number(word, model.names) for word in options.classes.split(",") if word]
    nfe, steps = model.nfe(**options.given()), model.config.sampler(**options.given())["steps"]
    titles = [model.names[k] for k in classes] or model.names           # a column a class, if that is a page
    columns, titles = (len(titles), titles) if 4 <= len(titles) <= 12 else (8, [])
    if suffix == ".gif":
        columns = min(columns, 5)
    usual = 12 if options.trajectory else columns * (4 if suffix == ".gif" else 8)
    seeds = read_seeds(options.seeds or f"0-{(options.num or usual) - 1}")
    rows = len(seeds) if options.trajectory else -(-len(seeds) // columns)
    check_out(options.out, 18 + rows * (max(64, model.net.input_size) + 4))
    start = time.perf_counter()
    if suffix == ".npz":
        draw_npz(model, seeds, options, classes)
    elif suffix == ".gif":
        draw_film([model, open_path(options.beside)] if options.beside else [model], seeds, options, classes,
                  columns)
    else:
        draw_page(model, seeds, options, classes, columns, titles)
    seconds = time.perf_counter() - start
    print0(f"{options.out}: {len(seeds)} images from {path}, {steps} steps, NFE {nfe} each, "
           f"{len(seeds) / seconds:.1f} images/s")
    if options.push and rank == 0:
        flags = " ".join(f"--{name} {text_of(v)}" for name, v in options.given().items() if v is not None)
        page = None if suffix == ".npz" else options.out
        print(push(options.push, model.net, model.config, model.names, page, flags))
    leave_distributed()


if __name__ == "__main__":
    run(lambda: main(OPTIONS))
