"""Train a UCGM model: many-step (diffusion, flow matching) or few-step (consistency), on one machine or many.

    python train.py                                       # the default: shapes, many-step
    python train.py --recipe shapes-few                   # then: fine-tune it to two steps
    torchrun --nproc_per_node=4 train.py                  # the same training on four GPUs
    python train.py --recipe mnist --lr 1e-3 --seed 1     # flags override the recipe

A run writes images, log.jsonl, model.safetensors and checkpoints into runs/RECIPE (--out). To resume, run the
same command again: it continues as if nothing had happened, on any number of processes. On SIGTERM, Ctrl-C
or a closed terminal it finishes the step, saves and exits; on SIGUSR1 it saves and carries on. A larger
--steps extends a run.
"""
from config import UserError, command_line, differences, read_config, user_errors

if __name__ == "__main__":      # before torch is loaded, so that -h and typos are answered at once
    CONFIG = command_line(read_config, __doc__)

import contextlib
import copy
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import (build, find_model, load_model, newest_state, read_state, restore_state, save_state,
                        set_aside, state_tensors)
from data import PIXELS, open_dataset, select_labels
from engine import (Signals, atomic_write, autocast, can_compile, check_writable, fix_order, from_rank0,
                    gradient_sync, ignore_disk_errors, init_distributed, leave_distributed, pick_device,
                    pick_dtype, print0, rank_and_world, run, spare_threads, wrap)
from log import (Log, LossByTime, describe, draw_curves, flops_per_image, last_words, preview, ticking,
                 utilisation)
from objective import null_of, resolve
from optim import (Skipped, can_capture, clip_gradient, finite_mean, learning_rate, make_optimizer,
                   optimizer_step, set_lr, update_ema)
from sample import Pipeline
from shapes import derive_seed

CHUNK = 16              # images whose randomness is drawn together, however the batch is divided
HELD_OUT = 256          # images that are never trained on; at most a twentieth of a finite set
TEACHER_EMA = 0.999     # EMA decay rate of the teacher in style ft-vs-fe


# ---- one batch, however it is divided -----------------------------------------------------------------

def split_batch(config, world):
    """The number of accumulation steps for a batch shared by `world` processes. UserError names sizes that
    would work."""
    unit, largest = CHUNK * world, config.micro_batch or config.batch_size
    share, rest = divmod(config.batch_size, unit)
    if rest or not share:
        near = " or ".join(str(n * unit) for n in (share, share + 1) if n)
        raise UserError(f"batch_size {config.batch_size} is not a multiple of {unit} ({CHUNK} per process): "
                        f"use {near}")
    if largest < CHUNK:
        raise UserError(f"micro_batch {largest} is too small: use at least {CHUNK}")
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n * CHUNK <= largest)


def chunks_of(config, accumulate, turn):
    """The chunks of each step that this process works on in its accumulation step `turn`."""
    rank, world = rank_and_world()
    return range(turn * world + rank, config.batch_size // CHUNK, world * accumulate)


def sample_indices(config, accumulate, start_step):
    """The positions in the data stream of each micro-batch of this process, from `start_step` on."""
    for step in range(start_step, config.steps):
        for turn in range(accumulate):
            starts = step * config.batch_size + CHUNK * np.array(chunks_of(config, accumulate, turn))
            yield (starts[:, None] + np.arange(CHUNK)).flatten()


def open_batches(data, config, accumulate, start_step, on_gpu, workers):
    """Micro-batches x, y, read by worker processes, or by this one if there are none."""
    return iter(torch.utils.data.DataLoader(
        data, batch_size=None, sampler=sample_indices(config, accumulate, start_step), pin_memory=on_gpu,
        num_workers=workers, multiprocessing_context="fork" if workers else None,
        worker_init_fn=lambda k: os.setpgid(0, 0)))     # signals to the group are for the main process


def draw(objective, x, seed, step, chunks, generator):
    """t, z, drop for a micro-batch. Those of a chunk are a function of (seed, step, chunk), whichever process
    works on it."""
    drawn = []
    for chunk, x_chunk in zip(chunks, x.split(CHUNK)):
        generator.manual_seed(derive_seed(seed, step, chunk))
        drawn.append(objective.draw(x_chunk, generator))
    return [torch.cat(parts) for parts in zip(*drawn)]


# ---- before the first step ----------------------------------------------------------------------------

def find_state(config):
    """The latest valid state of the run, or None. --fresh renames its folder, unless this is a restart.
    UserError for mistakes that show before the data are read."""
    check_writable(config.out)
    if size := PIXELS.get(config.data.partition(":")[0]):
        size = config.image_size or size
        with torch.device("meta"), contextlib.suppress(RuntimeError):   # a network may need real memory
            build(config, (3, size, size), 1)
    if config.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        set_aside(config.out)
    state = newest_state(config.out)
    if config.init_from and not state:
        find_model(config.init_from)
    return state


def open_data(config):
    """The stream that the config names. Settings that only the data can tell are filled into the config."""
    name, _, path = config.data.partition(":")
    if name == "latents":
        from extras.latents import open_latents
        data = open_latents(path, config.seed, config.vae)
        config.vae, config.latent_mean, config.latent_std = data.latent
        select_labels(data, config.labels)
    elif config.vae:
        raise UserError(f"{config.recipe} needs latents of {config.vae}, found data {config.data}: "
                        "give --data latents:DIR (python -m extras.latents encode makes one)")
    else:
        data = open_dataset(config.data, config.image_size or None, config.seed, config.labels, config.out)
    config.fingerprint = data.fingerprint
    return data


def load_start(config, net, names):
    """Load the weights of --init_from into the network. UserError: another network, or other classes."""
    start, other, start_names = load_model(config.init_from, model_name=config.model)
    published = all(name.isdigit() for name in start_names)     # such files number their classes
    if start_names != names and not published and not config.allow_change:
        raise UserError(f"{config.init_from} has the classes {start_names}, but {config.data} has {names}: "
                        "if that is intended, add --allow_change")
    shapes, needed = ({name: v.shape for name, v in n.state_dict().items()} for n in (start, net))
    if shapes != needed or (other.transport, other.x_pred) != (config.transport, config.x_pred):
        was, now = (f"{c.model} on {c.transport}, {n.input_size} px, {n.num_classes} classes, "
                    f"x_pred {c.x_pred}" for c, n in ((other, start), (config, net)))
        hint = ""
        if start.num_classes + 1 == net.num_classes:
            hint = ": its class table has no null row"
        raise UserError(f"{config.init_from} is {was}; this run is {now}{hint}")
    net.load_state_dict(start.state_dict())


def check_setup(config, data, net, previous, start_step, previous_names):
    """UserError for every reason not to start. previous, start_step, previous_names: of the resumed run."""
    with user_errors():
        objective = config.objective()
        objective.check_networks(null_of(net), config.init_from or config.style == "ft-vs-fe")
    Pipeline(net, config, data.names, None, None).nfe()         # raises if the sampler's settings clash
    if objective.lam > 0 and not config.init_from and resolve(config.transport).is_singular(0.1):
        print0(f"warning: {config.transport} with lam {objective.lam:g} trains to nothing, since at one end "
               "its output hardly determines the data; use --transport linear")
    if config.zeta > 0 and config.style == "ft-vs-fe" and not config.label_drop:
        print0("warning: with label_drop 0 the null class is never trained, but style ft-vs-fe needs it")
    if hasattr(data, "__len__") and len(data) < config.batch_size:
        raise UserError(f"{config.data} has {len(data)} images to train on: lower --batch_size to at most "
                        "that many")
    if config.fsdp and "RANK" not in os.environ:
        raise UserError("fsdp needs torchrun: torchrun --nproc_per_node=N train.py --fsdp ...")
    changed = differences(previous, config) if previous else []
    if previous_names != data.names:
        changed.append(f"classes: {previous_names} -> {data.names}")
    if changed and not config.allow_change:
        raise UserError(f"{config.out} holds a run with other settings: {'; '.join(changed)}. Use another "
                        "--out, or --fresh to start over, or --allow_change to resume anyway")
    if start_step > config.steps:
        raise UserError(f"{config.out} is already at step {start_step}: raise --steps, or start over with "
                        "--fresh")


def shard(nets):
    """Shard the networks over all processes, block by block (FSDP2)."""
    from torch.distributed.fsdp import fully_shard
    for network in nets:
        for module in (*network.blocks, network):
            fully_shard(module, reshard_after_forward=True)


# ---- every save_every steps ---------------------------------------------------------------------------

@torch.no_grad()
def held_out_loss(objective, net, teacher, x, y):
    """The loss on images that are never trained on, at fixed times and with fixed noise."""
    t = (torch.arange(len(x)).to(x) + 0.5) / len(x)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    drop = torch.zeros_like(t, dtype=torch.bool)
    groups = zip(*(v.split(64) for v in (x, y, t, z, drop)))
    return torch.cat([objective(net, *group, teacher) for group in groups]).mean().item()


def evaluate(pipeline, objective, teacher, held_out, step, log):
    """Held-out loss and a page of images. With FSDP all processes take part; process 0 writes."""
    if not (log.writes or pipeline.config.fsdp):
        return
    line, page = {"step": step}, None
    try:
        page = preview(pipeline)
    except ValueError as error:                 # a model that has diverged
        log.tell(str(error))
    if len(held_out[0]):
        # the teacher's blocks were compiled for training batches, which have another size
        with autocast(pipeline.device, pipeline.dtype), torch.compiler.set_stance("force_eager"):
            line["held_out_loss"] = held_out_loss(objective, pipeline.net, teacher, *held_out)
    log.write(line)
    if log.writes:
        with ignore_disk_errors("the page of images", log.tell):
            if page:
                file = Path(pipeline.config.out) / f"grid_{step:07d}.png"
                atomic_write(file, lambda path: page.save(path, "PNG"))
            draw_curves(pipeline.config.out)


def save(nets, optimizer, config, names, step, log):
    """Process 0 writes the state and the models; with FSDP it gathers all shards. False: the disk failed."""
    tensors = state_tensors(nets, optimizer) if log.writes or config.fsdp else None
    with ignore_disk_errors(f"the checkpoint of step {step}", log.tell):
        if log.writes:
            save_state(config.out, tensors, nets["net"], config, names, step)
        return True
    return False


# ---- the run ------------------------------------------------------------------------------------------

def main(config):                                                                       # noqa: C901
    rank, world = rank_and_world()
    device = pick_device(config.device)
    on_gpu = device.type == "cuda"
    objective, accumulate = config.objective(), split_batch(config, world)
    control = init_distributed(device)

    # Where does the run stand? Process 0 looks, the others follow.
    state = from_rank0(lambda: find_state(config), control)
    data = open_data(config)
    held_out = [value.to(device) for value in data.hold_out(HELD_OUT)]
    previous, start_step, previous_names = read_state(state) if state else (None, 0, data.names)
    config.threads = config.threads or (previous.threads if previous else spare_threads())
    if config.threads:
        torch.set_num_threads(config.threads)
    wanted = previous.dtype if previous and config.dtype == "auto" else config.dtype
    dtype = from_rank0(lambda: pick_dtype(wanted, device), control)
    config.dtype = str(dtype).removeprefix("torch.")

    # The network, its averages, its teacher.
    torch.manual_seed(config.seed)
    net = build(config, data.shape, len(data.names))
    check_setup(config, data, net, previous, start_step, previous_names)
    if config.init_from and not state:
        load_start(config, net, data.names)
    flops = flops_per_image(net) if on_gpu else 0
    net = net.to(device)
    frozen_copy = lambda: copy.deepcopy(net).requires_grad_(False).eval()
    emas, teacher = {decay: frozen_copy() for decay in config.ema}, None
    nets = {"net": net} | {f"ema{decay:g}": ema for decay, ema in emas.items()}
    if config.zeta > 0:
        teacher = nets["teacher"] = frozen_copy()
    if config.fsdp:
        shard(nets.values())
    optimizer = make_optimizer(config, net, dtype)
    if state:
        restore_state(state, previous, nets, optimizer)

    # The networks as the loop calls them: wrapped for several processes, and compiled.
    compiled = can_compile(device) if config.compile is None else config.compile
    fix_order(device, compiled, config.exact)
    model = wrap(net, device, compiled, config.fsdp)
    teacher_model = wrap(teacher, device, compiled, config.fsdp) if teacher else None
    losses, skipped = LossByTime(objective, device), Skipped(device)
    lam = torch.zeros((), device=device) if ":" in str(config.lam) else None    # a CUDA graph freezes a float

    def backward(x, y, t, z, drop):
        """Add the gradient of a micro-batch."""
        with autocast(device, dtype):
            loss = objective(model, x, y, t, z, drop, teacher_model, lam)               # (B,)
        (finite_mean(loss) / accumulate).backward()
        losses.add(loss.detach(), t)
        skipped.note(loss.detach(), t)

    def train_step(x, y, t, z, drop):
        """The last micro-batch of a step: add its gradient, clip the sum, and update the weights."""
        backward(x, y, t, z, drop)
        norm = clip_gradient(net, config.grad_clip)             # over all processes, so that all skip or none
        skipped.add(norm.isfinite())
        optimizer_step(optimizer, norm.isfinite())
        return norm

    if compiled and on_gpu and not config.fsdp and world * accumulate == 1 and find_spec("extras"):
        from extras.cudagraph import Graphed                    # the same step in a single launch
        train_step = Graphed(train_step, lambda: can_capture(optimizer))
    batches = open_batches(data, config, accumulate, start_step, on_gpu, 4 if on_gpu else 0)
    generator = torch.Generator("cpu" if device.type == "mps" else device)

    describe(config, net, data, device, world, accumulate, compiled, wanted)
    if state:
        print0(f"resumed from {state} at step {start_step} of {config.steps}")
    bar = tqdm(total=config.steps, initial=start_step, unit="step", disable=rank > 0, dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 10)
    log = Log(config.out, config, start_step, bar.write)
    decode = None
    if config.vae:
        from extras.latents import decoder
        decode = decoder(config, device)
    pipeline = Pipeline(emas[config.ema[0]], config, data.names, device, dtype, decode)
    clock, clock_step, waited, saved = time.perf_counter(), start_step, 0.0, True

    with Signals(control) as signals, bar, ticking(bar, compiled) as stop_ticking:
        for step in range(start_step, config.steps + 1):        # one more, to evaluate and save the last
            stop, save_now = signals.agree()
            due, moved = step % config.save_every == 0 or step == config.steps, step > start_step
            if due and not stop and (moved or step == 0):
                evaluate(pipeline, objective, teacher, held_out, step, log)
            if stop or ((due or save_now) and moved):
                saved = save(nets, optimizer, config, data.names, step, log)
                signals.saved = time.monotonic()
            if stop or step == config.steps:
                break
            if due or save_now:
                clock, clock_step, waited = time.perf_counter(), step, 0.0      # speed: of training alone

            set_lr(optimizer, learning_rate(config, step))
            if lam is not None:
                lam.fill_(config.lam_at(step))
            for turn in range(accumulate):
                asked = time.perf_counter()
                x, y = (value.to(device, non_blocking=True) for value in next(batches))
                waited += time.perf_counter() - asked
                t, z, drop = draw(objective, x, config.seed, step, chunks_of(config, accumulate, turn),
                                  generator)
                last = turn == accumulate - 1
                with gradient_sync(net, model, on=last):
                    norm = train_step(x, y, t, z, drop) if last else backward(x, y, t, z, drop)
            for decay, ema in emas.items():
                update_ema(ema, net, decay, step)
            if teacher and config.style == "ft-vs-fe":
                update_ema(teacher, net, TEACHER_EMA, step)

            if step == start_step and compiled:     # speed and remaining time are counted from the next step
                stop_ticking()
                bar.unpause()
                log.tell(f"compiled in the first step: {time.perf_counter() - clock:.0f} s")
                clock, clock_step, waited = time.perf_counter(), step + 1, 0.0
            bar.update()
            if not on_gpu and step == start_step + 20:
                minutes = (time.perf_counter() - clock) / (step + 1 - clock_step) * (config.steps - step) / 60
                log.tell(f"about {max(1, round(minutes))} min to go")
            done = step + 1     # with AdamW the host waits for the device only here, to write a log line
            if done % config.log_every == 0 or done == config.steps:
                line = {"step": done, "images": done * config.batch_size, **losses.take()}
                seconds = time.perf_counter() - clock
                speed = (done - clock_step) * config.batch_size / seconds
                line |= {"grad_norm": norm.item(), "lr": learning_rate(config, step), "images_per_s": speed,
                         "wait": round(waited / seconds, 4),    # the share of the time spent on next(batches)
                         "skipped": skipped.report(done, control, log.tell),
                         **utilisation(flops, objective, device, speed / world)}
                bar.set_postfix({"loss": line["loss"], "images/s": round(speed)})
                clock, clock_step, waited = time.perf_counter(), done, 0.0
                log.write(line)

    log.close()
    last_words(config, stop, step, start_step, saved)
    leave_distributed()


if __name__ == "__main__":
    run(lambda: main(CONFIG))
