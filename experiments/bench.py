"""How fast training and sampling are here, beside what the arithmetic allows.

    python experiments/bench.py                     # the default recipe on this machine
    python experiments/bench.py --baseline          # also the same from timm's blocks and from diffusers
    python experiments/bench.py --model TiT-XL/1 --size 16 --channels 32 --classes 1000 --no-x_pred

The limit is the rate of plain matrix products, measured first. A step of sampling costs one forward pass an
image (two with guidance), a step of training three (the backward pass counts as two) and those without
gradient: one for the teacher of ft-vs-fe; at lam = 1 two for the central difference, and one (fc-vs-xz) or
two (fc-vs-fe) for the teacher.
"""
import copy
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import build
from config import Config, read_flags, setting
from data import Shapes
from engine import autocast, clip_gradient, optimizer_step, pick_device, pick_dtype, run
from log import flops_per_image, forwards, peak_memory
from model import DiT
from sampler import count_nfe, sample, time_grid
from train import average, make_optimizer


@dataclass
class Options:
    model: str = setting("TiT-XXS/8", "as for train.py")
    size: int = setting(32, "side of the images or latents")
    channels: int = setting(3, "of them")
    classes: int = setting(8, "and their classes")
    x_pred: bool = setting(True, "as the default recipe has it; --no-x_pred for models of latents")
    batches: str = setting("64", "images in a batch, several with commas")
    dtypes: str = setting("auto", "bfloat16, float32 or both, with commas")
    compiles: str = setting("yes,no", "with torch.compile, without, or both")
    modes: str = setting("train,tune,sample", "what to time")
    seconds: float = setting(3.0, "of measuring, for each row")
    baseline: bool = setting(False, "also timm's blocks (pip install timm) and diffusers' DiT")
    device: str = setting("auto", "cuda, mps or cpu")


TUNING = dict(lam=1.0, zeta=1.0, optimizer="radam", dt=0.02)
TRAIN = {"lam 0":                 dict(),
         "lam 0, ft-vs-fe":       dict(zeta=0.5, style="ft-vs-fe")}
TUNE = {"lam 1, fc-vs-xz":        dict(style="fc-vs-xz", **TUNING),
        "lam 1, fc-vs-fe":        dict(style="fc-vs-fe", **TUNING),
        "lam 1, fc-vs-fe, jvp":   dict(style="fc-vs-fe", derivative="jvp", **TUNING)}
SAMPLE = {"sample, 1 step": (1, 1.0), "sample, 2 steps": (2, 1.0), "sample, 40 steps": (40, 1.0),
          "sample, 40 steps, guided": (40, 2.0)}
COLUMNS = ("what", "batch", "dtype", "compiled", "ms", "images/s", "TFLOP/s", "of the limit", "first call, s",
           "memory, GiB")


# ---- time ---------------------------------------------------------------------------------------------

def once(call, device):
    """Seconds until the device has done what call() asks for."""
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter() - start


def timed(call, device, seconds):
    """(median seconds of call() after three calls that compile and warm up, seconds of the first call)."""
    first, _, _ = (once(call, device) for _ in range(3))
    times = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(once(call, device))
    return statistics.median(times), first


def product_rate(device, dtype):
    """flop/s of a large matrix product, the best of many."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(once(lambda: a @ b, device) for _ in range(20))


# ---- what is timed: (call, forward passes an image) ---------------------------------------------------

def make_batch(net, batch, device):
    """Noise (batch, C, S, S) and classes (batch,)."""
    x = torch.randn(batch, net.in_channels, net.input_size, net.input_size, device=device)
    return x, torch.arange(batch, device=device) % net.num_classes


def compile_if(net, compiled):
    model = torch.compile(net) if compiled else net
    model.num_classes = net.num_classes
    return model


def train_step(config, net, batch, device, dtype, compiled):
    """A step of train.py on data that are there: draw, loss, backward, clip, optimiser, averages."""
    objective, optimizer = config.objective(), make_optimizer(config, net, dtype)
    ema, teacher = (copy.deepcopy(net).requires_grad_(False).eval() for _ in range(2))
    model, model_teacher = compile_if(net, compiled), compile_if(teacher, compiled)
    x, y = make_batch(net, batch, device)
    generator = torch.Generator("cpu" if device.type == "mps" else device).manual_seed(0)

    def step():
        t, z, drop = objective.draw(x, y, generator)
        with autocast(device, dtype):
            loss = objective(model, x, y, t, z, drop, model_teacher)
        loss.mean().backward()
        norm = clip_gradient(net, config.grad_clip)
        optimizer_step(optimizer, norm.isfinite())
        average(ema, net, 0.999, 100)
        if config.style == "ft-vs-fe":
            average(teacher, net, 0.999, 100)
    return step, forwards(objective)


def sample_call(steps, cfg_scale, net, batch, device, dtype, compiled):
    """A call of the sampler."""
    model, (z, y) = compile_if(net.eval(), compiled), make_batch(net, batch, device)

    def call():
        with autocast(device, dtype):
            sample(model, z, y, steps=steps, cfg_scale=cfg_scale)
    return call, count_nfe(time_grid(steps), cfg_scale=cfg_scale)


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

def cases(modes, is_peer):
    """What -> a function of (net, batch, device, dtype, compiled), which gives the call and its forwards."""
    rows = {}
    if "train" in modes:
        rows |= {what: partial(train_step, Config(**words)) for what, words in TRAIN.items()}
    if "tune" in modes and not is_peer:
        rows |= {what: partial(train_step, Config(**words)) for what, words in TUNE.items()}
    if "sample" in modes and not is_peer:
        rows |= {what: partial(sample_call, *settings) for what, settings in SAMPLE.items()}
    return rows


def print_row(cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main(options):
    device, config = pick_device(options.device), Config(model=options.model, x_pred=options.x_pred)
    build_net = lambda: build(config, (options.channels, options.size, options.size), options.classes)
    flops = flops_per_image(build_net())
    dtypes = [pick_dtype(name, device) for name in options.dtypes.split(",")]
    if options.baseline and torch.float32 not in dtypes:
        dtypes.append(torch.float32)
    rates = {dtype: product_rate(device, dtype) for dtype in dtypes}
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    products = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {str(dtype)[6:]}" for dtype, rate in rates.items())
    print(f"{name}, torch {torch.__version__}; {options.model} on {options.channels}x{options.size}x"
          f"{options.size}: {flops / 1e9:.3f} GFLOP an image forward; matrix products {products}\n")
    print_row(COLUMNS)
    print("|---" * len(COLUMNS) + "|")
    nets = {"": build_net, **(find_peers(build_net) if options.baseline else {})}
    batches, compiles = map(int, options.batches.split(",")), options.compiles.split(",")
    for batch, dtype, word in itertools.product(batches, dtypes, compiles):
        for peer, make in nets.items():
            for what, prepare in cases(options.modes, bool(peer)).items():
                torch._dynamo.reset()
                torch.manual_seed(0)
                call, units = prepare(make().to(device), batch, device, dtype, word == "yes")
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                seconds, first = timed(call, device, options.seconds)
                speed = batch * units * flops / seconds
                print_row((peer + what, batch, str(dtype)[6:], word, f"{seconds * 1e3:.1f}",
                           f"{batch / seconds:.0f}", f"{speed / 1e12:.3g}", f"{speed / rates[dtype]:.1%}",
                           f"{first:.1f}", f"{peak_memory(device):.2f}"))
    if device.type == "cpu":
        data = Shapes(options.size)
        seconds, _ = timed(lambda: data[range(64)], device, min(options.seconds, 1))
        print(f"\nrendering 64 shapes: {seconds * 1e3:.2f} ms")


if __name__ == "__main__":
    run(lambda: main(Options(**read_flags(Options, sys.argv[1:], __doc__))))
