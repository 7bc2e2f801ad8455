"""Train a UCGM: many-step (diffusion, flow) or few-step (consistency), on one machine or many.

    python train.py                                       # the default: shapes, many-step
    python train.py --recipe shapes-few                   # then: tune it to two steps
    torchrun --nproc_per_node=4 train.py                  # the same training on four GPUs
    python train.py --recipe mnist --lr 1e-3 --seed 1     # flags win over the recipe

A run writes images, log.jsonl, model.safetensors and checkpoints into runs/RECIPE (--out). To resume, run the
same command again: it goes on as if nothing had happened, on any number of processes. SIGTERM and Ctrl-C end
the step, save and exit; SIGUSR1 saves and goes on. A larger --steps extends the run (its rate rises again).
"""
from config import RECIPES, Config, command_line, differences, read_config, text_of

if __name__ == "__main__":      # before torch is loaded: -h and a mistyped flag answer at once
    CONFIG = command_line(read_config, __doc__)

import copy
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from checkpoint import (atomic_write, build, ignore_disk_errors, load_model, newest_state, read_state,
                        restore_state, save_state, set_aside, state_tensors)
from data import key, open_dataset, select_labels
from engine import (Graphed, Signals, Skipped, autocast, can_compile, clip_gradient, fix_order, from_rank0,
                    gradient_sync, init_distributed, leave_distributed, not_finite_to_nan, optimizer_step,
                    pick_device, pick_dtype, print0, rank_and_world, run, wrap)
from latents import decoder, open_latents
from log import Log, LossByTime, draw_curves, preview, utilisation
from objective import resolve
from optim import average, learning_rate, make_optimizer, recordable, set_rate
from published import without_sigma
from sample import Model
from sampler import check_sampler, time_grid

BLOCK = 16              # images whose randomness is drawn together, however the batch is dealt out
HELD_OUT = 256          # images that are never trained on, of a finite set at most a twentieth
TEACHER_EMA = 0.999     # decay of the teacher of ft-vs-fe


# ---- one batch, however it is dealt out ---------------------------------------------------------------

def split_batch(config, world):
    """Accumulation steps for a batch dealt out to `world` processes. ValueError names sizes that can be."""
    unit, largest = BLOCK * world, config.micro_batch or config.batch_size
    share, rest = divmod(config.batch_size, unit)
    if rest or not share:
        near = " or ".join(str(n * unit) for n in (share, share + 1) if n)
        raise ValueError(f"batch_size {config.batch_size} is no multiple of {BLOCK} a process: use {near}")
    if largest < BLOCK:
        raise ValueError(f"micro_batch {largest} is smaller than a block: use at least {BLOCK}")
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n * BLOCK <= largest)


def blocks_of(config, accumulate, turn):
    """The blocks of each step that this process works on in its accumulation step `turn`."""
    rank, world = rank_and_world()
    return range(turn * world + rank, config.batch_size // BLOCK, world * accumulate)


def sample_indices(config, accumulate, first):
    """The positions in the data stream of each micro-batch of this process, from step `first` on."""
    for step in range(first, config.steps):
        for turn in range(accumulate):
            starts = step * config.batch_size + BLOCK * np.array(blocks_of(config, accumulate, turn))
            yield (starts[:, None] + np.arange(BLOCK)).flatten()


def open_batches(data, config, accumulate, first, device):
    """Micro-batches x, y, read by worker processes beside a GPU."""
    on_gpu = device.type == "cuda"
    return iter(torch.utils.data.DataLoader(
        data, batch_size=None, sampler=sample_indices(config, accumulate, first), pin_memory=on_gpu,
        num_workers=4 if on_gpu else 0, multiprocessing_context="fork" if on_gpu else None,
        worker_init_fn=lambda k: os.setpgid(0, 0)))     # a signal to the group is for the main process


def draw(objective, x, y, seed, step, blocks, generator):
    """t, z, drop for a micro-batch: a function of (seed, step, block), whoever works on the block."""
    drawn = []
    for block, x_block, y_block in zip(blocks, x.split(BLOCK), y.split(BLOCK)):
        generator.manual_seed(key(seed, step, block))
        drawn.append(objective.draw(x_block, y_block, generator))
    return [torch.cat(parts) for parts in zip(*drawn)]


def step_of(config, objective, net, model, teacher, optimizer, losses, skipped, device, dtype, accumulate=1):
    """Two functions of x, y, t, z, drop. learn adds the gradient of a micro-batch. learn_and_move also ends
    the step, and returns the gradient's norm. Neither reads a tensor's value: a CUDA graph can hold it."""
    def learn(x, y, t, z, drop):
        with autocast(device, dtype):
            loss = objective(model, x, y, t, z, drop, teacher)                          # (B,)
        (not_finite_to_nan(loss) / accumulate).backward()
        losses.add(loss.detach(), t)
        skipped.look(loss.detach(), t)

    def learn_and_move(*batch):
        learn(*batch)
        norm = clip_gradient(net, config.grad_clip)             # of all processes, so all skip or none
        skipped.add(norm.isfinite())
        optimizer_step(optimizer, norm.isfinite())
        return norm
    return learn, learn_and_move


# ---- before the first step ----------------------------------------------------------------------------

def find_state(config):
    """The newest good state of the run, or None. --fresh puts its folder aside, unless torchrun restarts."""
    if config.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return set_aside(config.out)
    return newest_state(config.out)


def open_data(config):
    """The stream that the config names. What the data alone know goes into the config."""
    kind, _, path = config.data.partition(":")
    if kind == "latents":
        data = open_latents(path, config.seed, config.vae)
        config.vae, config.latent_mean, config.latent_std = data.latent
        select_labels(data, config.labels)
    elif config.vae:
        raise ValueError(f"{config.recipe} wants latents of {config.vae}, found data {config.data}: "
                         "give --data latents:DIR (python latents.py encode makes one)")
    else:
        size = config.image_size or None
        data = open_dataset(config.data, size, config.seed, config.labels, config.out)
    config.fingerprint = getattr(data, "fingerprint", "")
    return data


def load_start(config, net, names):
    """Put the weights of --init_from into the network. ValueError for another one, or other classes."""
    start, other, known = load_model(config.init_from, model_name=config.model)
    weights = without_sigma(start.state_dict(), net)
    numbered = all(name.isdigit() for name in known)        # as published files have them
    if known != names and not numbered and not config.allow_change:
        raise ValueError(f"{config.init_from} knows the classes {known}, and {config.data} has {names}: "
                         "if that is meant, add --allow_change")
    shapes, wanted = ({name: v.shape for name, v in w.items()} for w in (weights, net.state_dict()))
    if shapes != wanted or (other.transport, other.x_pred) != (config.transport, config.x_pred):
        was, now = (f"{c.model} on {c.transport}, {n.input_size} px, {n.num_classes} classes, "
                    f"x_pred {c.x_pred}" for c, n in ((other, start), (config, net)))
        hint = ": its table of classes has no null row" * (start.num_classes + 1 == net.num_classes)
        raise ValueError(f"{config.init_from} is {was}; this run is {now}{hint}")
    net.load_state_dict(weights)


def check_setup(config, data, net, before, first, old_names):
    """Every reason not to start, as a ValueError. before, first, old_names: of the run that goes on."""
    s, guided = config.sampler(), config.zeta > 0
    times = time_grid(s["steps"], s["schedule"], s["gap"])
    check_sampler(resolve(config.transport), times, s["kappa"], s["rho"], 1, s["cfg_scale"], len(data.names))
    if hasattr(data, "__len__") and len(data) < config.batch_size:
        raise ValueError(f"{config.data} has {len(data)} images to train on: lower --batch_size to that")
    if config.fsdp and "RANK" not in os.environ:
        raise ValueError("fsdp needs processes: torchrun --nproc_per_node=N train.py --fsdp ...")
    if guided and config.style != "ft-vs-fe" and not config.init_from:
        raise ValueError(f"style {config.style} needs a teacher: give --init_from, such as runs/shapes")
    if guided and config.style != "fc-vs-xz" and not net.num_classes:
        raise ValueError(f"style {config.style} needs a null class: give --labels all, or --zeta 0")
    changed = differences(before, config) if before else []
    if old_names != data.names:
        changed.append(f"classes: {old_names} -> {data.names}")
    if changed and not config.allow_change:
        raise ValueError(f"{config.out} holds a run with other settings: {'; '.join(changed)}. Take another "
                         "--out, or --fresh to start over, or --allow_change")
    if first > config.steps:
        raise ValueError(f"{config.out} is already at step {first}: raise --steps, or start over by --fresh")


# ---- now and then -------------------------------------------------------------------------------------

@torch.no_grad()
def held_out_loss(objective, net, teacher, x, y):
    """The loss on images that are never trained on, at fixed times and noise."""
    t = (torch.arange(len(x)).to(x) + 0.5) / len(x)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    drop = torch.zeros_like(y, dtype=torch.bool)
    groups = zip(*(v.split(64) for v in (x, y, t, z, drop)))
    return torch.cat([objective(net, *group, teacher) for group in groups]).mean().item()


def look(model, objective, teacher, held_out, step, out, log):
    """Held-out loss and a page of images. With FSDP all processes work, process 0 writes."""
    if not (log.writes or model.config.fsdp):
        return
    line, page = {"step": step}, None
    try:
        page = preview(model)
    except ValueError as error:                 # a model that has diverged
        log.tell(str(error))
    if len(held_out[0]):
        # the teacher's blocks are compiled for the batches of the training, not for these
        with autocast(model.device, model.dtype), torch.compiler.set_stance("force_eager"):
            line["held_out_loss"] = held_out_loss(objective, model.net, teacher, *held_out)
    log.write(line)
    if log.writes:
        with ignore_disk_errors("the page of images", log.tell):
            if page:
                atomic_write(out / f"grid_{step:07d}.png", lambda path: page.save(path, "PNG"))
            draw_curves(out)


def save(nets, optimizer, config, names, step, out, log):
    """The state and the models, by process 0; with FSDP all hand in shards. False: the disk failed."""
    tensors = state_tensors(nets, optimizer) if log.writes or config.fsdp else None
    with ignore_disk_errors(f"the checkpoint of step {step}", log.tell):
        if log.writes:
            save_state(out, tensors, nets["net"], config, names, step)
        return True
    return False


def next_commands(config):
    """The commands that go on from here, with the flags that this run had."""
    line = f"images and model are in {config.out}. Next: python sample.py --ckpt {shlex.quote(config.out)}"
    row = RECIPES.get(config.recipe + "-few")
    if config.lam > 0 or row is None:
        return line
    few = Config(**row, recipe=config.recipe + "-few")
    names = ("data", "labels", "image_size", "model", "transport")
    start = {"init_from": config.out, **{name: getattr(config, name) for name in names}}
    flags = [f"--{name} {shlex.quote(text_of(value))}" for name, value in start.items()
             if value != getattr(few, name)]
    if config.x_pred != few.x_pred:
        flags.append("--x_pred" if config.x_pred else "--no-x_pred")
    if config.out != f"runs/{config.recipe}":
        flags.append(f"--out {shlex.quote(config.out + '-few')}")
    return line + f", or tune it to two steps: python train.py --recipe {' '.join([few.recipe, *flags])}"


def threads_of(device):
    """What to say of the threads on a CPU. They wait for one another in a loop, so one that must share its
    core with another program slows all of them, several times."""
    if device.type != "cpu":
        return ""
    threads, load = torch.get_num_threads(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    free = max(1, math.floor(os.cpu_count() - load + 0.5))
    busy = f" (other programs keep {load:.1f} of {os.cpu_count()} cores: --threads {free} may be faster)"
    return f", threads {threads}{busy if load > 0.7 and free < threads else ''}"


def last_words(config, stop, step, first, saved):
    """What became of the run, and what to type next. ValueError if the disk did not take its end."""
    if not saved:
        raise ValueError(f"step {step} is not in {config.out}: free some disk space and run it again")
    if stop:
        name = signal.Signals(stop).name
        print0(f"stopped by {name} at step {step} of {config.steps}; the same command resumes")
        return
    if first == config.steps:
        print0("this run is complete; a larger --steps extends it, --fresh starts over")
    print0(next_commands(config))


# ---- the run ------------------------------------------------------------------------------------------

def main(config):                                                                       # noqa: C901
    rank, world = rank_and_world()
    device, out = pick_device(config.device), Path(config.out)
    on_gpu = device.type == "cuda"
    if config.threads:
        torch.set_num_threads(config.threads)
    objective, accumulate = config.objective(), split_batch(config, world)
    control = init_distributed(device)

    # Where does the run stand? Process 0 looks, all agree.
    state = from_rank0(lambda: find_state(config), control)
    data = open_data(config)
    held_out = [value.to(device) for value in data.hold_out(HELD_OUT)]
    before, first, old_names = read_state(state) if state else (None, 0, data.names)
    wanted = before.dtype if before and config.dtype == "auto" else config.dtype
    dtype = from_rank0(lambda: pick_dtype(wanted, device), control)
    config.dtype = str(dtype).removeprefix("torch.")

    # The network, its averages, its teacher.
    torch.manual_seed(config.seed)
    net = build(config, data.shape, len(data.names))
    check_setup(config, data, net, before, first, old_names)
    if config.init_from and not state:
        load_start(config, net, data.names)
    net = net.to(device)
    frozen_copy = lambda: copy.deepcopy(net).requires_grad_(False).eval()
    emas = {decay: frozen_copy() for decay in config.ema}
    teacher = frozen_copy() if config.zeta > 0 else None
    nets = {"net": net, **{f"ema{decay:g}": ema for decay, ema in emas.items()}}
    if teacher:
        nets["teacher"] = teacher
    for network in nets.values() if config.fsdp else ():
        for module in (*network.blocks, network):
            fully_shard(module, reshard_after_forward=True)
    optimizer = make_optimizer(config, net, dtype)
    if state:
        restore_state(state, before, nets, optimizer)

    # What the loop calls: wrapped for several processes, and compiled.
    compiled = can_compile(device) if config.compile is None else config.compile
    fix_order(device, compiled, config.exact)
    model = wrap(net, device, compiled, config.fsdp)
    model_teacher = wrap(teacher, device, compiled, config.fsdp) if teacher else None
    losses, skipped, saved = LossByTime(objective, device), Skipped(device), True

    learn, learn_and_move = step_of(config, objective, net, model, model_teacher, optimizer, losses, skipped,
                                    device, dtype, accumulate)
    if compiled and on_gpu and not config.fsdp and world * accumulate == 1:
        learn_and_move = Graphed(learn_and_move, lambda: recordable(optimizer))
    batches = open_batches(data, config, accumulate, first, device)
    generator = torch.Generator("cpu" if device.type == "mps" else device)

    millions, wait = sum(p.numel() for p in net.parameters()) / 1e6, "15 s" if on_gpu else "a minute"
    print0(f"{config.model}, {millions:.2f} M parameters, on {config.data} {'x'.join(map(str, data.shape))}; "
           f"{device}{threads_of(device)}, {config.dtype}"
           f"{f', compiled in the first step: {wait}' * compiled}")
    print0(f"batch {config.batch_size} = {world} process{'es' * (world > 1)} x {accumulate} accumulation "
           f"step{'s' * (accumulate > 1)} x {config.batch_size // world // accumulate} images")
    if state:
        print0(f"resumed from {state} at step {first} of {config.steps}")
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=rank > 0, dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 10)
    log = Log(out, config, first, bar.write)
    ema_model = Model(emas[config.ema[0]], config, data.names, device, dtype, decoder(config, device))
    clock, clock_step = time.perf_counter(), first

    with Signals(control) as signals, bar:
        for step in range(first, config.steps + 1):     # one more: the last is looked at and saved
            stop, save_now = signals.agree()
            due = step % config.save_every == 0 or step == config.steps
            if due and not stop and (step > first or first == 0):       # a resumed run has looked already
                look(ema_model, objective, teacher, held_out, step, out, log)
            if stop or ((due or save_now) and step > first):
                saved = save(nets, optimizer, config, data.names, step, out, log)
            if stop or step == config.steps:
                break

            if due or save_now:
                clock, clock_step = time.perf_counter(), step           # not a part of the speed
            set_rate(optimizer, learning_rate(config, step))
            for turn in range(accumulate):
                x, y = (value.to(device, non_blocking=True) for value in next(batches))
                blocks = blocks_of(config, accumulate, turn)
                t, z, drop = draw(objective, x, y, config.seed, step, blocks, generator)
                last = turn == accumulate - 1
                with gradient_sync(net, model, on=last):
                    norm = (learn_and_move if last else learn)(x, y, t, z, drop)
            for decay, ema in emas.items():
                average(ema, net, decay, step)
            if teacher and config.style == "ft-vs-fe":
                average(teacher, net, TEACHER_EMA, step)
            if step == first and compiled:      # the speed and the time left are those of the steps after it
                bar.unpause()
                log.tell(f"compiled in the first step: {time.perf_counter() - clock:.0f} s")
                clock, clock_step = time.perf_counter(), step + 1
            bar.update()

            done = step + 1     # a line of the log: with AdamW only here does the host wait for the device
            if done % config.log_every == 0 or done == config.steps:
                line = {"step": done, "images": done * config.batch_size, **losses.take()}
                speed = (done - clock_step) * config.batch_size / (time.perf_counter() - clock)
                line |= {"grad_norm": norm.item(), "lr": learning_rate(config, step), "images_per_s": speed,
                         "skipped": skipped.take(done, control, log.tell),
                         **utilisation(net, objective, device, speed / world)}
                loss = math.nan if line["loss"] is None else line["loss"]
                bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s")
                clock, clock_step = time.perf_counter(), done
                log.write(line)
                skipped.check(done)

    log.close()
    last_words(config, stop, step, first, saved)
    leave_distributed()


if __name__ == "__main__":
    run(lambda: main(CONFIG))
