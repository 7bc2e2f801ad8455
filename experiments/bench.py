"""How fast training and sampling are here, beside what the arithmetic allows.

    python experiments/bench.py                     # the default recipe on this machine
    python experiments/bench.py --baseline          # also the same from timm's blocks and from diffusers
    python experiments/bench.py --model TiT-XL/1 --size 16 --channels 32 --classes 1000 --no-x_pred

The limit is the rate of plain matrix products, measured first. A step of sampling costs one forward pass an
image (two with guidance), a step of training three (the backward pass counts as two) and those without
gradient: one for the teacher of ft-vs-fe; at lam = 1 two for the central difference, and one (fc-vs-xz) or
two (fc-vs-fe) for the teacher. The last column has the shares of a call's time in products, attention,
pointwise lines (norms, gates, rotary, casts) and optimiser (with clipping and averages). The published code
was timed on an H200: batch 64, bfloat16, its blocks compiled one by one.
"""
import copy
import itertools
import re
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import build
from config import Config, read_flags, setting
from shapes import Shapes
from engine import autocast, fix_order, pick_device, pick_dtype, run, wrap
from extras.cudagraph import Graphed
from log import LossByTime, flops_per_image, forwards, peak_memory
from model import DiT
from sample import count_nfe
from sampler import sample, time_grid
from optim import (Skipped, can_capture, clip_gradient, finite_mean, make_optimizer, optimizer_step,
                   update_ema)


@dataclass
class Options:
    model: str = setting("TiT-XXS/8", "as for train.py")
    size: int = setting(32, "side of the images or latents")
    channels: int = setting(3, "of them")
    classes: int = setting(8, "and their classes")
    x_pred: bool = setting(True, "as the default recipe has it; --no-x_pred for models of latents")
    batches: str = setting("64", "images in a batch, several with commas")
    dtypes: str = setting("auto", "bfloat16, float32 or both, with commas")
    compiles: str = setting("yes,no", "yes: as train.py does; no; launched: yes, but without CUDA graphs")
    modes: str = setting("train,tune,sample", "what to time")
    only: str = setting("", "the rows whose name this regular expression fits, such as fc-vs-fe")
    seconds: float = setting(3.0, "of measuring, for each row")
    kernels: int = setting(0, "below each row its slowest kernels, as many as this", least=0)
    baseline: bool = setting(False, "also timm's blocks (pip install timm) and diffusers' DiT")
    exact: bool = setting(False, "on a GPU: sums in a fixed order, as train.py --exact")
    device: str = setting("auto", "cuda, mps or cpu")


TUNING = dict(lam=1.0, zeta=1.0, optimizer="radam", dt=0.02)
TRAIN = {"lam 0":                 dict(),
         "lam 0, ft-vs-fe":       dict(zeta=0.5, style="ft-vs-fe"),
         "lam 0, Muon":           dict(zeta=0.4, style="ft-vs-fe", optimizer="muon")}    # the default recipe
TUNE = {"lam 1, fc-vs-xz":        dict(style="fc-vs-xz", **TUNING),
        "lam 1, fc-vs-fe":        dict(style="fc-vs-fe", **TUNING),
        "lam 1, fc-vs-fe, jvp":   dict(style="fc-vs-fe", derivative="jvp", **TUNING)}
COLUMNS = ("what", "batch", "dtype", "compiled", "ms", "images/s", "TFLOP/s", "of the limit", "first call, s",
           "memory, GiB", "published, images/s", "products, attention, pointwise, optimiser")
PUBLISHED = {"lam 0, ft-vs-fe": 324, "lam 1, fc-vs-fe": 200}        # TiT-XL/1 on 16x16x32 latents
# what a kernel's name has, the first that fits; what fits none is pointwise
PARTS = {"pointwise": "^triton", "attention": "attention|flash|fmha|sdpa",
         "optimiser": "adam|multi_tensor|foreach|lerp|vector_norm",
         "products": "gemm|nvjet|cutlass|xmma|cublas|mm$|mkl|onednn|_linear"}


# ---- time ---------------------------------------------------------------------------------------------

def once(call, device):
    """Seconds until the device has done what call() asks for."""
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter() - start


def timed(call, device, seconds):
    """(median seconds of call() after eight that compile, warm up and record, seconds of the first)."""
    first, *_ = (once(call, device) for _ in range(8))
    times = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(once(call, device))
    return statistics.median(times), first


def product_rate(device, dtype):
    """flop/s of a large matrix product, the best of many."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(once(lambda: a @ b, device) for _ in range(20))


def parts(call, device, kernels):
    """The shares of the time of a call in products, attention, pointwise and optimiser, in percent, and a
    line for each of the slowest kernels: ms, how often, name."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        once(call, device)
    times = dict.fromkeys(("products", "attention", "pointwise", "optimiser"), 0.0)
    spent = lambda event: event.self_device_time_total if on_gpu else event.self_cpu_time_total
    events = sorted(profile.key_averages(), key=spent, reverse=True)
    for event in events:
        fits = (part for part, words in PARTS.items() if re.search(words, event.key, re.IGNORECASE))
        times[next(fits, "pointwise")] += spent(event)
    shares = ", ".join(f"{100 * time / max(1, sum(times.values())):.0f}" for time in times.values())
    lines = [f"{spent(event) / 1e3:9.2f} ms {event.count:5} x {event.key}" for event in events[:kernels]]
    return shares + " %", lines


# ---- what is timed: (call, forward passes per image) ---------------------------------------------------

def make_batch(net, batch, device):
    """Noise (batch, C, S, S) and classes (batch,)."""
    x = torch.randn(batch, net.in_channels, net.input_size, net.input_size, device=device)
    return x, torch.arange(batch, device=device) % net.num_classes


def compiled_net(net, device, how):
    """As train.py does; a peer whole."""
    model = wrap(net, device, how != "no") if hasattr(net, "blocks") or how == "no" else torch.compile(net)
    model.num_classes = net.num_classes
    return model


def sampling_net(net, device, how):
    """As sample.py does, but compiled."""
    if how == "yes" and device.type == "cuda":
        net.forward = Graphed(net.forward)
    return compiled_net(net.eval(), device, how)


def make_step(config, objective, net, model, teacher, optimizer, losses, skipped, device, dtype,
              lam=None):
    """train.py's step on one batch, as a function of x, y, t, z, drop."""
    def step(x, y, t, z, drop):
        with autocast(device, dtype):
            loss = objective(model, x, y, t, z, drop, teacher, lam)                     # (B,)
        finite_mean(loss).backward()
        losses.add(loss.detach(), t)
        skipped.note(loss.detach(), t)
        norm = clip_gradient(net, config.grad_clip)
        skipped.add(norm.isfinite())
        optimizer_step(optimizer, norm.isfinite())
        return norm
    return step


def train_step(config, net, batch, device, dtype, compiled):
    """A step of train.py on data that are there: draw, loss, backward, clip, optimiser, averages."""
    objective, optimizer = config.objective(), make_optimizer(config, net, dtype)
    ema, teacher = (copy.deepcopy(net).requires_grad_(False).eval() for _ in range(2))
    model, model_teacher = (compiled_net(network, device, compiled) for network in (net, teacher))
    x, y = make_batch(net, batch, device)
    generator = torch.Generator("cpu" if device.type == "mps" else device).manual_seed(0)

    learn = make_step(config, objective, net, model, model_teacher, optimizer,
                      LossByTime(objective, device), Skipped(device), device, dtype)
    if compiled == "yes" and device.type == "cuda":
        learn = Graphed(learn, lambda: can_capture(optimizer))

    def step():
        learn(x, y, *objective.draw(x, generator))
        update_ema(ema, net, 0.999, 100)
        if config.style == "ft-vs-fe":
            update_ema(teacher, net, 0.999, 100)
    return step, forwards(objective)


def sample_call(steps, cfg_scale, net, batch, device, dtype, compiled):
    """A call of the sampler."""
    model, (z, y) = sampling_net(net, device, compiled), make_batch(net, batch, device)

    def call():
        with autocast(device, dtype):
            sample(model, z, y, steps=steps, cfg_scale=cfg_scale)
    return call, count_nfe(time_grid(steps), cfg_scale=cfg_scale)


def bare_passes(net, batch, device, dtype, compiled):
    """What two steps of sampling cost at least."""
    model, (z, y) = sampling_net(net, device, compiled), make_batch(net, batch, device)
    t = torch.full((batch,), 0.5, device=device)

    @torch.no_grad()
    def call():
        with autocast(device, dtype):
            model(model(z, t, y), t, y)
    return call, 2


SAMPLE = {"sample, 1 step": partial(sample_call, 1, 1.0), "sample, 2 steps": partial(sample_call, 2, 1.0),
          "2 bare forward passes": bare_passes, "sample, 40 steps": partial(sample_call, 40, 1.0),
          "sample, 40 steps, guided": partial(sample_call, 40, 2.0)}


# ---- peers --------------------------------------------------------------------------------------------

def timm_net(net):
    """SiT from timm's attention and MLP, at the shape of `net`: what one would otherwise write."""
    from timm.models.vision_transformer import Attention, Mlp
    depth, width, heads = len(net.blocks), net.final_layer.linear.in_features, net.blocks[0].attn.heads
    peer = DiT(net.input_size, net.patch_size, net.in_channels, width, depth, heads,
               num_classes=net.num_classes, x_pred=net.x_pred)

    class WithoutRotary(Attention):
        def forward(self, x, rope):
            return super().forward(x)
    for block in peer.blocks:
        block.attn = WithoutRotary(width, num_heads=heads, qkv_bias=True)
        block.mlp = Mlp(width, 4 * width, act_layer=partial(nn.GELU, approximate="tanh"), drop=0)
    return peer


def diffusers_net(net):
    """diffusers' DiTTransformer2DModel at the shape of `net`, called as one of ours."""
    from diffusers import DiTTransformer2DModel
    depth, width, heads = len(net.blocks), net.final_layer.linear.in_features, net.blocks[0].attn.heads

    class Peer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = DiTTransformer2DModel(heads, width // heads, net.in_channels, net.in_channels, depth,
                                             sample_size=net.input_size, patch_size=net.patch_size,
                                             num_embeds_ada_norm=net.num_classes)
            self.num_classes = net.num_classes
            self.in_channels, self.input_size = net.in_channels, net.input_size

        def forward(self, x, t, y):
            return self.net(x, timestep=1000 * t, class_labels=y).sample
    return Peer()


def find_peers(build_net):
    """Name -> a function that builds the peer, of those whose library is installed."""
    peers = {}
    for name, make in (("timm, ", timm_net), ("diffusers, ", diffusers_net)):
        try:
            make(build_net())
            peers[name] = lambda make=make: make(build_net())
        except ImportError as error:
            print(f"no baseline {name}{error.name} is not installed")
    return peers


# ---- the table ----------------------------------------------------------------------------------------

def cases(modes, only, is_peer):
    """What -> a function of (net, batch, device, dtype, compiled), which gives the call and its forwards."""
    rows = {}
    if "train" in modes:
        rows |= {what: partial(train_step, Config(**words)) for what, words in TRAIN.items()}
    if "tune" in modes and not is_peer:
        rows |= {what: partial(train_step, Config(**words)) for what, words in TUNE.items()}
    if "sample" in modes and not is_peer:
        rows |= SAMPLE
    return {what: prepare for what, prepare in rows.items() if re.search(only, what)}


def print_row(cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main(options):
    device, config = pick_device(options.device), Config(model=options.model, x_pred=options.x_pred)
    build_net = lambda: build(config, (options.channels, options.size, options.size), options.classes)
    with FakeTensorMode():                      # counts without computing
        flops = flops_per_image(build_net())
    there = torch.device("cpu" if device.type == "mps" else device)     # XL takes seconds on a CPU
    dtypes = [pick_dtype(name, device) for name in options.dtypes.split(",")]
    if options.baseline and torch.float32 not in dtypes:
        dtypes.append(torch.float32)
    rates = {dtype: product_rate(device, dtype) for dtype in dtypes}
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    products = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {str(dtype)[6:]}" for dtype, rate in rates.items())
    print(f"{name}, torch {torch.__version__}; {options.model} on {options.channels}x{options.size}x"
          f"{options.size}: {flops / 1e9:.3f} GFLOP per image forward; matrix products {products}\n")
    print_row(COLUMNS)
    print("|---" * len(COLUMNS) + "|")
    nets = {"": build_net, **(find_peers(build_net) if options.baseline else {})}
    batches, compiles = map(int, options.batches.split(",")), options.compiles.split(",")
    for batch, dtype, word in itertools.product(batches, dtypes, compiles):
        for peer, make in nets.items():
            for what, prepare in cases(options.modes, options.only, bool(peer)).items():
                torch._dynamo.reset()
                fix_order(device, word != "no", options.exact)
                torch.manual_seed(0)
                with there:
                    net = make()
                call, units = prepare(net.to(device), batch, device, dtype, word)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                seconds, first = timed(call, device, options.seconds)
                speed = batch * units * flops / seconds
                shares, slowest = parts(call, device, options.kernels)
                print_row((peer + what, batch, str(dtype)[6:], word, f"{seconds * 1e3:.1f}",
                           f"{batch / seconds:.0f}", f"{speed / 1e12:.3g}", f"{speed / rates[dtype]:.1%}",
                           f"{first:.1f}", f"{peak_memory(device):.2f}",
                           PUBLISHED.get(what, "") if options.model == "TiT-XL/1" else "",
                           shares))
                print("\n".join(slowest) + "\n" * bool(slowest), end="")
    if device.type == "cpu":
        data = Shapes(options.size)
        seconds, _ = timed(lambda: data[range(64)], device, min(options.seconds, 1))
        print(f"\nrendering 64 shapes: {seconds * 1e3:.2f} ms")


if __name__ == "__main__":
    run(lambda: main(Options(**read_flags(Options, sys.argv[1:], __doc__))))
