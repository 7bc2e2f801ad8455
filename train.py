"""Train a UCGM: many-step (diffusion, flow) or few-step (consistency), on one machine or many.

    python train.py                                       # the default: shapes, many-step
    python train.py --recipe shapes-few                   # then: tune it to two steps
    torchrun --nproc_per_node=4 train.py                  # the same training on four GPUs
    python train.py --recipe mnist --lr 1e-3 --seed 1     # flags win over the recipe

A run writes into runs/RECIPE (--out): pictures, log.jsonl, model.safetensors (which sample.py reads) and checkpoints. To resume
after any interruption, run the same command again: it goes on as if nothing had happened, on any number of processes. SIGTERM
and Ctrl-C finish the step, save and exit; SIGUSR1 saves and goes on; --fresh yes starts over; a larger --steps extends the run.
"""
import contextlib
import copy
import datetime
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import State, build, load_model, newest_state, push, save_model, save_state, set_aside, state_tensors, survive_full_disk, write_safely
from config import RECIPES, differences, fail, read_config
from data import key, open_dataset
from latents import Autoencoder
from machine import autocast, can_compile, join, pick_device, pick_dtype, place, say
from objective import resolve
from report import Log, draw_curves, preview, utilisation
from sample import Model
from sampler import check, time_grid

BLOCK = 16      # pictures whose randomness is drawn together; the batch is dealt out in blocks, so that its contents do not depend on the deal


# ---- one batch, however it is dealt -------------------------------------------------------------------------------

def split_batch(config, world):
    """Accumulation steps for a batch dealt to `world` processes; ValueError names batch sizes that can be dealt."""
    share, rest = divmod(config.batch_size, BLOCK * world)
    if rest or not share:
        unit = BLOCK * world
        near = sorted({max(1, share) * unit, (share + 1) * unit})
        raise ValueError(f"batch_size {config.batch_size} cannot be dealt to {world} process{'es' * (world > 1)} in blocks of {BLOCK}; "
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

def orthogonal(matrix, dtype):
    """U V^T of the singular value decomposition U S V^T, nearly: five steps of a quintic iteration in dtype (bfloat16 is enough), which brings
    every singular value that is not tiny to 0.7 .. 1.2. The coefficients are Muon's (https://kellerjordan.github.io/posts/muon)."""
    x = matrix.to(dtype) if matrix.shape[0] <= matrix.shape[1] else matrix.to(dtype).T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.AdamW):
    """AdamW, but for the matrices of attention and MLP in the blocks: their step is the momentum, made orthogonal and of the size of an Adam step
    (arXiv 2502.16982), so that directions which few pictures ask for are learned as fast as the others. dtype: of the products which do that; those
    of a CPU without bfloat16 take 30 times as long in it."""

    def __init__(self, net, dtype, *settings, **more):
        super().__init__([p for p in net.parameters() if p.requires_grad], *settings, **more)
        self.dtype = dtype
        self.matrices = [p for name, p in net.named_parameters() if p.ndim == 2 and name.startswith("blocks.") and "adaLN" not in name]

    @torch.no_grad()
    def step(self):
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        for weight in self.matrices:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            momentum = self.state[weight]["momentum"]
            momentum.lerp_(weight.grad, 0.05)
            change = orthogonal(weight.grad.lerp(momentum, 0.95), self.dtype)                        # Nesterov's momentum
            weight.mul_(1 - lr * decay).add_(change, alpha=-0.2 * lr * max(weight.shape) ** 0.5)
            weight.grad = None                                     # AdamW leaves out what has no gradient
        super().step()


def make_optimizer(config, net, dtype):
    weights = [p for p in net.parameters() if p.requires_grad]
    if config.optimizer == "muon":
        return Muon(net, dtype, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)
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


def update(optimizer, finite):
    """One optimiser step, or none where the gradient is not finite (finite: bool tensor on the device)."""
    if type(optimizer) is torch.optim.AdamW:        # fused: the kernel itself looks, and the host does not wait
        optimizer.found_inf = (~finite).float()
        optimizer.step()
    elif finite:                                    # RAdam and Muon have no fused kernel: the host waits for one number
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def held_out_loss(objective, net, teacher, x, y):
    """The loss on pictures that are never trained on, at fixed times and noise: comparable from step to step."""
    t = ((torch.arange(len(x), device=x.device) + 0.5) / len(x)).to(x)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    parts = [objective(net, *group, torch.zeros_like(group[2], dtype=torch.bool), teacher)
             for group in zip(x.split(64), y.split(64), t.split(64), z.split(64))]
    return torch.cat(parts).mean().item()


# ---- asked from outside -------------------------------------------------------------------------------------------

class Requests:
    """Signals, as flags that all processes agree on once a step: SIGTERM and SIGINT to stop, SIGUSR1 to save.

    After a request to stop the process has `grace` seconds: if a peer is lost, the step that it waits for never ends. A thread counts
    them, since Python runs no handler while the main thread is inside such a step.
    """

    def __init__(self, group, grace):
        self.flags, self.group, self.grace = torch.zeros(2, dtype=torch.int32), group, grace

    def __enter__(self):
        self.before = {s: signal.signal(s, self.stop) for s in (signal.SIGTERM, signal.SIGINT)}
        self.before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self.save)
        self.heard, self.told = socket.socketpair()
        self.told.setblocking(False)
        signal.set_wakeup_fd(self.told.fileno())    # every signal that has a handler is also written there, at once
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *error):
        signal.set_wakeup_fd(-1)
        self.told.close()                           # the watcher then ends
        self.watcher.join()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self, number, frame):
        self.flags[0] = number

    def save(self, number, frame):
        self.flags[1] = 1

    def watch(self):
        """Leave, without saving, when the grace is over or somebody asks a second time."""
        asked = None
        while True:
            self.heard.settimeout(None if asked is None else max(0.01, asked + self.grace - time.monotonic()))
            try:
                number = self.heard.recv(1)
            except TimeoutError:
                break
            if not number:                                          # the run is over
                return
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                if asked and time.monotonic() - asked > 5:          # a terminal and torchrun both pass Ctrl-C on: two at once are one
                    break
                asked = asked or time.monotonic()
        os.write(2, b"\nstopped without saving: the same command resumes from the last checkpoint\n")
        os._exit(1)

    def agree(self):
        """(signal number to stop for or 0, whether to save): the same answer in every process."""
        flags, self.flags[1] = self.flags.clone(), 0
        if self.group is not None:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return flags.tolist()


# ---- the run ------------------------------------------------------------------------------------------------------

def main(config):
    rank, world = place()
    device, out = pick_device(config.device), Path(config.out)
    accumulate = split_batch(config, world)
    objective = config.objective()
    data = open_dataset(config.data, config.image_size or None, config.seed, config.labels, config.data_dir, config.vae, config.latent_mean, config.latent_std)
    if config.data.startswith("latents:"):
        config.vae, config.latent_mean, config.latent_std = data.latent
    elif config.vae:
        raise ValueError(f"{config.recipe} is for latents of {config.vae}, found data {config.data}: give --data latents:DIR (python latents.py encode makes one)")
    if config.shard and "RANK" not in os.environ:
        raise ValueError("shard deals the network out to the processes of torchrun: torchrun --nproc_per_node=N train.py --shard yes ...")
    held_out = data.hold_out(config.held_out)
    if hasattr(data, "__len__") and len(data) < config.batch_size:
        raise ValueError(f"{config.data} has {len(data)} pictures to train on, fewer than one batch of {config.batch_size}: add pictures, or lower --batch_size")
    drawing = config.sampler()
    check(resolve(config.transport), time_grid(*(drawing[name] for name in ("steps", "schedule", "gap", "order"))),
          drawing["kappa"], drawing["rho"], drawing["order"], drawing["cfg_scale"], len(data.names))

    # Processes. The control group is on the CPU whatever the device: flags travel there without waiting for the GPU.
    control = None
    if world > 1:
        join(device, rank, world)
        control = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=30))

    # Where the run stands: process 0 looks, the others follow.
    if rank == 0 and config.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":      # torchrun restarts the same command
        set_aside(out)
    found = [newest_state(out), pick_dtype(config.dtype, device)] if rank == 0 else [None, None]
    if world > 1:
        dist.broadcast_object_list(found, group=control)
    state, dtype = State(found[0]) if found[0] else None, found[1]
    if state and config.dtype == "auto":
        dtype = getattr(torch, state.config.dtype)
    config.dtype = str(dtype)[6:]

    # The network, its averages, and its teacher.
    torch.manual_seed(config.seed)
    net = build(config, data.shape, len(data.names))
    net.grad_checkpoint = config.grad_checkpoint
    if state:
        changed = differences(state.config, config)
        if changed and not config.allow_change:
            raise ValueError(f"{out} holds a run with other settings: {'; '.join(changed)}. Take another --out, or --fresh yes to start over, or --allow_change yes")
    elif config.init_from:
        start, start_config, _ = load_model(config.init_from)
        shapes = [{name: tuple(value.shape) for name, value in n.state_dict().items()} for n in (net, start)]
        if shapes[0] != shapes[1] or (start_config.transport, start_config.data_output) != (config.transport, config.data_output):
            raise ValueError(f"{config.init_from} is {start_config.model} on {start_config.transport}, {start.input_size} px, {start.num_classes} classes, "
                             f"data_output {start_config.data_output}; this run is {config.model} on {config.transport}, {net.input_size} px, "
                             f"{net.num_classes}, {config.data_output}: make them equal")
        net.load_state_dict(start.state_dict())
    elif config.enhancement_ratio > 0 and config.enhancement_style != "ft-vs-fe":
        raise ValueError(f"style {config.enhancement_style} needs a trained teacher: give --init_from, such as --init_from runs/shapes")
    if config.enhancement_ratio > 0 and config.enhancement_style != "fc-vs-xz" and not net.num_classes:
        raise ValueError(f"style {config.enhancement_style} compares with the null class, and without labels there is none: use --labels all, or --enhancement_ratio 0")
    net = net.to(device)
    nets = {"net": net, **{f"ema{decay:g}": copy.deepcopy(net).requires_grad_(False).eval() for decay in config.ema}}
    if config.enhancement_ratio > 0:
        nets["teacher"] = copy.deepcopy(net).requires_grad_(False).eval()
    emas, teacher = [nets[f"ema{decay:g}"] for decay in config.ema], nets.get("teacher")
    if config.shard:
        for network in nets.values():
            for block in network.blocks:
                fully_shard(block)
            fully_shard(network, reshard_after_forward=True)       # also after the calls that no backward pass follows
    optimizer = make_optimizer(config, net, dtype)
    first, best = 0, math.inf
    if state:
        first, best = state.step, state.best
        if first > config.steps:
            raise ValueError(f"{out} is already at step {first}: give --steps {first} or more, or --fresh yes to start over")
        state.restore(nets, optimizer)

    # What the loop calls: wrapped for several processes, and compiled.
    model, model_teacher = net, teacher
    if world > 1 and not config.shard:
        model = DistributedDataParallel(net, broadcast_buffers=False)
    compiled = config.compile == "yes" or config.compile == "auto" and can_compile(device)
    if compiled:
        torch.use_deterministic_algorithms(device.type == "cpu")         # else the threads of the compiled backward add up the classes' gradient in any order
        torch.utils.deterministic.fill_uninitialized_memory = False      # a help in debugging only, which costs time
        model, model_teacher = torch.compile(model), teacher and torch.compile(teacher)
    model.num_classes = net.num_classes

    # The data: a stream of positions, read by worker processes where that helps.
    workers = config.workers if config.workers >= 0 else 4 if device.type == "cuda" else 0
    loader = iter(torch.utils.data.DataLoader(data, batch_size=None, sampler=positions(config, first, world, accumulate, rank), num_workers=workers,
                                              pin_memory=device.type == "cuda", multiprocessing_context="fork" if workers else None,
                                              worker_init_fn=lambda k: os.setpgid(0, 0)))            # a signal to the group is this process's affair
    generator = torch.Generator(device="cpu" if device.type == "mps" else device)
    held_out = [v.to(device) for v in held_out]

    out.mkdir(parents=True, exist_ok=True)
    say(f"{config.model}, {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, on {config.data} {'x'.join(map(str, data.shape))}; {device}, "
        f"{config.dtype}{', compiled (the first steps take longer)' if compiled else ''}{', sharded' if config.shard else ''}")
    say(f"batch {config.batch_size} = {world} process{'es' * (world > 1)} x {accumulate} accumulation step{'s' * (accumulate > 1)} x "
        f"{config.batch_size // world // accumulate} pictures")
    if state:
        say(f"resumed from {found[0]} at step {first} of {config.steps}")
    decode = None
    if config.vae and rank == 0:
        try:
            decode = Autoencoder(config.vae, config.latent_mean, config.latent_std).to(device).decode
        except ValueError as error:
            say(f"the pictures of this run show three channels of the latents: {error}")
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=rank > 0, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 10)
    log = Log(out, config, first, bar.write) if rank == 0 else None
    by_t = torch.zeros(5, 3, device=device)                        # sum of loss, of unweighted loss, and count, by fifths of t
    skipped = torch.zeros(3, device=device)                        # steps skipped since the last report, in a row, and a t of the last one
    clock, clock_step, stopped = time.perf_counter(), first, 0

    with Requests(control, config.grace) as requests:
        for step in range(first, config.steps + 1):
            # Look, save, and leave if asked: at the top, so that the first and the last step are covered.
            last = step == config.steps
            stopped, save_now = requests.agree()
            begun = step > first or first == 0
            if begun and (step % config.held_out_every == 0 or last) and len(held_out[0]):
                with autocast(device, dtype):
                    value = held_out_loss(objective, emas[0], teacher, *held_out)
                best, is_best = min(best, value), value <= best
                tensors = state_tensors({"": emas[0]}) if is_best and (rank == 0 or config.shard) else None
                if rank == 0:
                    log.write({"step": step, "held_out_loss": value})
                    if tensors:
                        with survive_full_disk("the best model", bar.write):
                            save_model(out / "best.safetensors", tensors, net, config, data.names)
            if begun and (step % config.sample_every == 0 or last) and (rank == 0 or config.shard):
                page = preview(Model(emas[0], config, data.names, device, dtype, decode))
                if rank == 0:
                    with survive_full_disk("the pictures", bar.write):
                        write_safely(out / f"grid_{step:07d}.png", lambda path: page.save(path, "PNG"))
                        draw_curves(out)
            if (step > first or stopped) and (step % config.save_every == 0 or last or save_now or stopped) and (rank == 0 or config.shard):
                tensors = state_tensors(nets, optimizer)
                if rank == 0:
                    with survive_full_disk(f"the checkpoint of step {step}", bar.write):
                        save_state(out, tensors, net, config, data.names, step, best)
            if last or stopped:
                break

            # One step of training.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            for turn in range(accumulate):
                x, y = (v.to(device, non_blocking=True) for v in next(loader))
                t, z, drop = draw(objective, x, y, config.seed, step, dealt_blocks(config, world, accumulate, rank, turn), generator)
                wait = world > 1 and turn < accumulate - 1         # gradients travel once a step, on the last turn
                if config.shard:
                    net.set_requires_gradient_sync(not wait)
                with model.no_sync() if wait and not config.shard else contextlib.nullcontext():
                    with autocast(device, dtype):
                        loss = objective(model, x, y, t, z, drop, model_teacher)                     # (B,)
                    (loss.mean() / accumulate).backward()
                good = loss.detach().isfinite()
                skipped[2] = torch.where(good, skipped[2], t).max()
                seen = torch.stack([loss.detach(), loss.detach() / objective.time_weight(t.clamp(max=1 - 1e-4)), torch.ones_like(t)], 1)
                by_t.index_add_(0, (5 * t).long().clamp(max=4), torch.where(good[:, None], seen, 0.0))
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip or math.inf)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            finite = norm.isfinite()                               # of all processes: the norm is of the summed gradient
            skipped[0] += ~finite
            skipped[1] = (skipped[1] + 1) * ~finite
            update(optimizer, finite)
            for ema, decay in zip(emas, config.ema):
                average(ema, net, decay, step)
            if teacher is not None and config.enhancement_style == "ft-vs-fe":
                average(teacher, net, config.teacher_ema, step)
            bar.update()

            # A line of the log. Only here does the host wait for the device.
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                if world > 1:
                    dist.all_reduce(by_t)
                total, seconds = by_t.sum(0).tolist(), time.perf_counter() - clock
                lost, row, bad_t = skipped.tolist()
                if lost:
                    where = [(rank, bad_t)] * world
                    if world > 1:
                        dist.all_gather_object(where, (rank, bad_t), group=control)
                    culprit = ", ".join(f"t = {v:.3f} on process {r}" for r, v in where if v)
                    bar.write(f"step {step + 1}: {int(lost)} steps skipped, loss or gradient not finite{f' (last seen at {culprit})' if culprit else ''}") if rank == 0 else None
                    if row >= config.max_skipped:
                        raise ValueError(f"{int(row)} steps in a row were not finite, up to step {step + 1}: the weights are those before them, and the last "
                                         f"checkpoint in {out} is good. Look at the data, or lower --lr, and run the same command with --allow_change yes")
                line = {"step": step + 1, "images": (step + 1) * config.batch_size, "loss": total[0] / max(1, total[2]),
                        "loss_by_t": [round(v, 5) for v in (by_t[:, 1] / by_t[:, 2].clamp_min(1)).tolist()], "grad_norm": norm.item(),
                        "lr": learning_rate(config, step), "images_per_s": (step + 1 - clock_step) * config.batch_size / seconds, "skipped": int(lost),
                        **utilisation(net, objective, device, (step + 1 - clock_step) * config.batch_size / seconds / world)}
                bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['images_per_s']:.0f} images/s")
                if log:
                    log.write(line)
                by_t.zero_()
                skipped[[0, 2]] = 0
                clock, clock_step = time.perf_counter(), step + 1

    bar.close()
    if stopped:
        say(f"stopped by {signal.Signals(stopped).name} at step {step} of {config.steps}; the same command resumes")
    else:
        if first == config.steps:
            say("this run is complete; a larger --steps extends it, --fresh yes starts over")
        more = config.consistency_ratio == 0 and config.recipe + "-few" in RECIPES
        say(f"model and pictures are in {out}. Next: python sample.py --ckpt {out} --steps {config.sample_steps}"
            + (f", or tune it to two steps: python train.py --recipe {config.recipe}-few" if more else ""))
        if config.push and rank == 0:
            say(push(config.push, *load_model(out), out / f"grid_{config.steps:07d}.png"))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(read_config(sys.argv[1:], __doc__))
    except ValueError as error:
        fail(error)
    except Exception:
        if place()[1] == 1:
            raise
        traceback.print_exc()       # a peer is lost: leave at once, without the goodbye that would wait for it; torchrun restarts all
        os._exit(1)
