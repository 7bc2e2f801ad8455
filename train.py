"""Train a UCGM: many-step (diffusion, flow) or few-step (consistency), on one machine or many.

    python train.py                                       # the default: shapes, many-step
    python train.py --recipe shapes-few                   # then: tune it to two steps
    torchrun --nproc_per_node=8 train.py                  # the same training on eight GPUs
    python train.py --recipe mnist --lr 1e-3 --seed 1     # flags win over the recipe

A run writes into runs/RECIPE (--out): grids of pictures, log.jsonl, and model.safetensors, which sample.py reads.
"""
import contextlib
import copy
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import build, load_model, save_model
from config import RECIPES, fail, read_config
from data import contact_sheet, key, open_dataset
from objective import resolve
from sampler import check, sample, time_grid

BLOCK = 16      # pictures whose randomness is drawn together; the batch is dealt out in blocks, so that its contents do not depend on the deal


# ---- where to run -------------------------------------------------------------------------------------------------

def pick_device(wanted, local_rank=0):
    """A torch.device; "auto" is cuda, mps or cpu, the first that is there. ValueError if the wanted one is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in there if there[name]) if wanted == "auto" else wanted
    if not there.get(name):
        raise ValueError(f"device {wanted!r} is not available; this machine has: {', '.join(n for n in there if there[n])}")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def pick_dtype(wanted, device):
    """The dtype of the matrix products; "auto" is bfloat16 where it is faster: on GPUs that have it, on CPUs by a try."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type != "cpu":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32

    def seconds(dtype):
        a = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return min(times)
    return torch.bfloat16 if 1.5 * seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ---- one batch, however it is dealt -------------------------------------------------------------------------------

def split_batch(config, world):
    """Accumulation steps for a batch dealt to `world` processes; ValueError names batch sizes that can be dealt."""
    share, rest = divmod(config.batch_size, BLOCK * world)
    if rest or not share:
        unit = BLOCK * world
        near = sorted({max(1, share) * unit, (share + 1) * unit})
        raise ValueError(f"batch_size {config.batch_size} cannot be dealt to {world} processes in blocks of {BLOCK}; "
                         f"use a multiple of {unit}, such as {' or '.join(map(str, near))}")
    fits = [n for n in range(1, share + 1) if share % n == 0 and (not config.micro_batch or share // n * BLOCK <= config.micro_batch)]
    if not fits:
        raise ValueError(f"micro_batch {config.micro_batch} is smaller than a block of {BLOCK}; use at least {BLOCK}")
    return fits[0]


def dealt_blocks(config, world, accumulate, rank, turn):
    """The blocks of each step that process `rank` works on in its accumulation step `turn`."""
    return range(turn * world + rank, config.batch_size // BLOCK, world * accumulate)


def positions(config, first_step, world, accumulate, rank):
    """The places in the data stream of every micro-batch of this process, from first_step to the end."""
    for step in range(first_step, config.steps):
        for turn in range(accumulate):
            blocks = dealt_blocks(config, world, accumulate, rank, turn)
            yield np.concatenate([step * config.batch_size + block * BLOCK + np.arange(BLOCK) for block in blocks])


def draw(objective, x, y, seed, step, blocks, generator):
    """t, z, drop for a micro-batch: a function of (seed, step, block), whoever works on the block."""
    drawn = []
    for block, x_block, y_block in zip(blocks, x.split(BLOCK), y.split(BLOCK)):
        generator.manual_seed(key(seed, step, block))
        drawn.append(objective.draw(x_block, y_block, generator))
    return [torch.cat(parts) for parts in zip(*drawn)]


# ---- the optimisation's small parts -------------------------------------------------------------------------------

def make_optimizer(config, net):
    weights = [p for p in net.parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(weights, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)
    return torch.optim.RAdam(weights, config.lr, config.betas, weight_decay=config.weight_decay, decoupled_weight_decay=True)


def learning_rate(config, step):
    """Linear warm-up, a plateau, then half a cosine down to 0 over the last part of the run."""
    up = min(1, (step + 1) / max(1, config.warmup))
    left = (config.steps - step) / max(1, config.decay * config.steps)
    return config.lr * up * (1 if config.decay == 0 or left >= 1 else 0.5 - 0.5 * math.cos(math.pi * left))


@torch.no_grad()
def average(ema, net, decay, step):
    """Exponential moving average of the weights; the decay grows with the steps, so that early weights are forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def preview(net, config, path, device, dtype, columns):
    """A grid of pictures with fixed noise and classes, drawn with the recipe's own sampler settings."""
    count = 8 * columns
    z = torch.stack([torch.randn(net.in_channels, net.input_size, net.input_size, generator=torch.Generator().manual_seed(k)) for k in range(count)])
    y = torch.arange(count) % columns if net.num_classes else torch.zeros(count, dtype=torch.int64)
    torch.manual_seed(config.seed)
    with autocast(device, dtype):
        x = sample(net, z.to(device), y.to(device), **config.sampler())
    contact_sheet(x, columns).save(path)


# ---- the run ------------------------------------------------------------------------------------------------------

def main(config):
    rank, local_rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = pick_device(config.device, local_rank)
    dtype = pick_dtype(config.dtype, device)
    accumulate = split_batch(config, world)
    objective = config.objective()
    data = open_dataset(config.data, config.image_size or None, config.seed, config.labels, config.data_dir)
    if hasattr(data, "__len__") and len(data) < config.batch_size:
        raise ValueError(f"{config.data} has {len(data)} pictures, fewer than one batch of {config.batch_size}: add pictures, or lower --batch_size")
    drawing = config.sampler()
    check(resolve(config.transport), time_grid(*(drawing[name] for name in ("steps", "schedule", "gap", "order"))),
          drawing["kappa"], drawing["rho"], drawing["order"], drawing["cfg_scale"], len(data.names))
    say = print if rank == 0 else lambda *words: None

    # The network, its average, and its teacher.
    torch.manual_seed(config.seed)
    net = build(config, data.shape, len(data.names))
    if config.init_from:
        start, start_config, _ = load_model(config.init_from)
        shapes = [{name: tuple(value.shape) for name, value in n.state_dict().items()} for n in (net, start)]
        if shapes[0] != shapes[1] or start_config.transport != config.transport:
            raise ValueError(f"{config.init_from} is {start_config.model} on {start_config.transport}, {start.input_size} px, {start.num_classes} classes; "
                             f"this run is {config.model} on {config.transport}, {net.input_size} px, {net.num_classes}: make them equal")
        net.load_state_dict(start.state_dict())
    elif config.enhancement_ratio > 0 and config.enhancement_style != "ft-vs-fe":
        raise ValueError(f"style {config.enhancement_style} needs a trained teacher: give --init_from, such as --init_from runs/shapes")
    if config.enhancement_ratio > 0 and config.enhancement_style != "fc-vs-xz" and not net.num_classes:
        raise ValueError(f"style {config.enhancement_style} compares with the null class, and without labels there is none: use --labels all, or fc-vs-xz")
    net = net.to(device)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    teacher = copy.deepcopy(net).requires_grad_(False).eval() if config.enhancement_ratio > 0 else None
    optimizer = make_optimizer(config, net)
    compiled = config.compile == "yes" or config.compile == "auto" and device.type != "mps"
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = DistributedDataParallel(net, broadcast_buffers=False) if world > 1 else net
    model_teacher = teacher
    if compiled:
        model, model_teacher = torch.compile(model), teacher and torch.compile(teacher)
    model.num_classes = net.num_classes

    # The data: a stream of positions, read by worker processes where that helps.
    workers = config.workers if config.workers >= 0 else 0 if device.type == "cpu" else 4
    loader = iter(torch.utils.data.DataLoader(data, batch_size=None, sampler=positions(config, 0, world, accumulate, rank),
                                              num_workers=workers, pin_memory=device.type == "cuda"))
    generator = torch.Generator(device="cpu" if device.type == "mps" else device)

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    say(f"{config.model}, {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, on {config.data} {'x'.join(map(str, data.shape))}; {device}, "
        f"{str(dtype)[6:]}{', compiled (the first steps take longer)' if compiled else ''}")
    say(f"batch {config.batch_size} = {world} process{'es' * (world > 1)} x {accumulate} accumulation step{'s' * (accumulate > 1)} x "
        f"{config.batch_size // world // accumulate} pictures")
    bar = tqdm(total=config.steps, unit="step", disable=rank > 0, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 10)
    log = open(out / "log.jsonl", "a") if rank == 0 else None
    by_t = torch.zeros(5, 3, device=device)                        # sum of loss, of unweighted loss, and count, by fifths of t
    clock, clock_step = time.perf_counter(), 0

    for step in range(config.steps + 1):
        last = step == config.steps
        if rank == 0 and (step % config.sample_every == 0 or last):
            preview(ema, config, out / f"grid_{step:07d}.png", device, dtype, columns=min(max(1, net.num_classes), 10))
            save_model(out / "model.safetensors", ema, config, data.names)
        if last:
            break

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        for turn in range(accumulate):
            x, y = (v.to(device, non_blocking=True) for v in next(loader))
            t, z, drop = draw(objective, x, y, config.seed, step, dealt_blocks(config, world, accumulate, rank, turn), generator)
            quiet = world > 1 and turn < accumulate - 1            # gradients travel once a step, on the last turn
            with model.no_sync() if quiet else contextlib.nullcontext():
                with autocast(device, dtype):
                    loss = objective(model, x, y, t, z, drop, model_teacher)                         # (B,)
                (loss.mean() / accumulate).backward()
            unweighted = loss.detach() / objective.time_weight(t.clamp(max=1 - 1e-4))
            by_t.index_add_(0, (5 * t).long().clamp(max=4), torch.stack([loss.detach(), unweighted, torch.ones_like(t)], 1))
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average(ema, net, config.ema, step)
        if teacher is not None and config.enhancement_style == "ft-vs-fe":
            average(teacher, net, config.teacher_ema, step)

        bar.update()
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            if world > 1:
                dist.all_reduce(by_t)
            total, seconds = by_t.sum(0), time.perf_counter() - clock
            line = {"step": step + 1, "images": (step + 1) * config.batch_size, "loss": (total[0] / total[2]).item(),
                    "loss_by_t": [round(v, 5) for v in (by_t[:, 1] / by_t[:, 2]).tolist()], "grad_norm": norm.item(),
                    "lr": learning_rate(config, step), "images_per_s": (step + 1 - clock_step) * config.batch_size / seconds}
            bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['images_per_s']:.0f} images/s")
            if log:
                print(json.dumps(line), file=log, flush=True)
            by_t.zero_()
            clock, clock_step = time.perf_counter(), step + 1

    bar.close()
    follow = f"python train.py --recipe {config.recipe}-few" if config.consistency_ratio == 0 and config.recipe + "-few" in RECIPES else None
    say(f"model and pictures are in {out}. Next: python sample.py --ckpt {out} --steps {config.sample_steps}" + (f", or two steps: {follow}" if follow else ""))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(read_config(sys.argv[1:], __doc__))
    except ValueError as error:
        fail(error)
