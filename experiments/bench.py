"""How fast training and sampling are here, beside what the arithmetic allows.

    python bench.py                                       # the default recipe on this machine
    python bench.py --model TiT-XL/1 --size 16 --channels 32 --classes 1000 --batches 64,128,256     # ImageNet latents, on a GPU
    python bench.py --baseline yes                        # also the same network from timm's blocks and from diffusers

The limit is the rate of plain matrix products, measured first. A picture costs forwards: 1 to sample a step (2 with guidance); to train
3 (forward, and backward at twice its price), and so many more without gradient: 1 for ft-vs-fe's teacher; at lambda = 1 two for
the difference quotient, and one (fc-vs-xz) or two (fc-vs-fe) for the teacher.
"""
import copy
import functools
import itertools
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn as nn

from checkpoint import build
from config import Config, fail, read_flags
from data import Shapes
from machine import autocast, pick_device, pick_dtype
from report import flops_per_image, forwards, peak_memory
from sampler import sample
from train import average, make_optimizer, update


@dataclass
class Options:
    model: str = "TiT-XXS/8"                    # as for train.py
    size: int = 32                              # side of the pictures or latents
    channels: int = 3                           # of them
    classes: int = 8                            # and their classes
    data_output: bool = True                    # as the default recipe; no for models of latents
    batches: str = "64"                         # pictures in a batch, several with commas
    dtypes: str = "auto"                        # bfloat16, float32 or both, with commas
    compiles: str = "yes,no"                    # with torch.compile, without, or both
    modes: str = "train,tune,sample"            # what to time
    seconds: float = 3                          # of measuring, for each row
    baseline: bool = False                      # also timm's blocks (pip install timm) and diffusers' DiT
    device: str = "auto"                        # cuda, mps or cpu


TRAIN = {"lambda 0":                 dict(),
         "lambda 0, ft-vs-fe":       dict(enhancement_ratio=0.5, enhancement_style="ft-vs-fe")}
TUNE = {"lambda 1, fc-vs-xz":       dict(consistency_ratio=1.0, enhancement_ratio=1.0, enhancement_style="fc-vs-xz", optimizer="radam", eps=0.02),
        "lambda 1, fc-vs-fe":       dict(consistency_ratio=1.0, enhancement_ratio=1.0, enhancement_style="fc-vs-fe", optimizer="radam", eps=0.02),
        "lambda 1, fc-vs-fe, jvp":  dict(consistency_ratio=1.0, enhancement_ratio=1.0, enhancement_style="fc-vs-fe", optimizer="radam", derivative="jvp")}
SAMPLE = {"sample, 1 step": (1, 1.0), "sample, 2 steps": (2, 1.0), "sample, 40 steps": (40, 1.0), "sample, 40 steps, guided": (40, 2.0)}


def once(call, device):
    """Seconds until the device has done what call() asks for."""
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter() - start


def timed(call, device, seconds):
    """Median seconds of call(), after three calls that compile and warm up; and the seconds until the first call was done."""
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


def train_step(config, net, batch, device, dtype, compiled):
    """One whole step as train.py does it, on data that are there already: draw, loss, backward, clip, optimiser, averages."""
    objective, optimizer = config.objective(), make_optimizer(config, net, dtype)
    ema, teacher = (copy.deepcopy(net).requires_grad_(False).eval() for _ in range(2))
    model, model_teacher = (torch.compile(net), torch.compile(teacher)) if compiled else (net, teacher)
    model.num_classes = net.num_classes
    x = torch.randn(batch, net.in_channels, net.input_size, net.input_size, device=device)
    y = torch.arange(batch, device=device) % net.num_classes
    generator = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(0)

    def step():
        t, z, drop = objective.draw(x, y, generator)
        with autocast(device, dtype):
            loss = objective(model, x, y, t, z, drop, model_teacher)
        loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        update(optimizer, norm.isfinite())
        average(ema, net, 0.999, 100)
        if config.enhancement_style == "ft-vs-fe":
            average(teacher, net, 0.999, 100)
    return step, forwards(objective)


def sample_call(net, batch, steps, cfg, device, dtype, compiled):
    model = torch.compile(net) if compiled else net
    z = torch.randn(batch, net.in_channels, net.input_size, net.input_size, device=device)
    y = torch.arange(batch, device=device) % net.num_classes

    def call():
        with autocast(device, dtype):
            sample(model, z, y, steps=steps, cfg_scale=cfg, null=net.num_classes)
    return call, steps * (2 if cfg != 1 else 1)


def timm_net(net):
    """The network of SiT from timm's attention and MLP, at the shape of `net`: what one would otherwise write."""
    from timm.models.vision_transformer import Attention, Mlp

    from model import DiT
    depth, width, heads = len(net.blocks), net.y_embedder.embedding_table.weight.shape[1], net.blocks[0].attn.heads
    peer = DiT(net.input_size, net.patch_size, net.in_channels, width, depth, heads, num_classes=net.num_classes, data_output=net.data_output)

    class Wrapped(Attention):
        def forward(self, x, rope):
            return super().forward(x)
    for block in peer.blocks:
        block.attn = Wrapped(width, num_heads=heads, qkv_bias=True)
        block.mlp = Mlp(in_features=width, hidden_features=4 * width, act_layer=functools.partial(nn.GELU, approximate="tanh"), drop=0)
    return peer


def diffusers_net(net):
    """diffusers' DiTTransformer2DModel at the shape of `net`, called as one of ours."""
    from diffusers import DiTTransformer2DModel
    heads, width = net.blocks[0].attn.heads, net.y_embedder.embedding_table.weight.shape[1]

    class Peer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = DiTTransformer2DModel(heads, width // heads, net.in_channels, net.in_channels, len(net.blocks), sample_size=net.input_size,
                                             patch_size=net.patch_size, num_embeds_ada_norm=net.num_classes)
            self.num_classes, self.in_channels, self.input_size = net.num_classes, net.in_channels, net.input_size

        def forward(self, x, t, y):
            return self.net(x, timestep=1000 * t, class_labels=y).sample
    return Peer()


def rows(options, device, rates, build_net):
    """(name, batch, dtype, compiled, call, forwards a picture) of every row of the table."""
    nets = {"": build_net}
    if options.baseline:
        for name, make in (("timm, ", timm_net), ("diffusers, ", diffusers_net)):
            try:
                make(build_net())
                nets[name] = lambda make=make: make(build_net())
            except ImportError as error:
                print(f"no baseline {name}{error.name} is not installed")
    for batch, dtype, word in itertools.product(map(int, options.batches.split(",")), rates, options.compiles.split(",")):
        compiled = word == "yes"
        for peer, make in nets.items():
            cases = {**(TRAIN if "train" in options.modes else {}), **(TUNE if "tune" in options.modes and not peer else {})}
            for name, words in cases.items():
                torch._dynamo.reset()
                torch.manual_seed(0)
                yield peer + name, batch, dtype, compiled, *train_step(Config(**words), make().to(device), batch, device, dtype, compiled)
            for name, (steps, cfg) in SAMPLE.items() if "sample" in options.modes and not peer else ():
                torch._dynamo.reset()
                yield name, batch, dtype, compiled, *sample_call(make().to(device).eval(), batch, steps, cfg, device, dtype, compiled)


def main(options):
    device, config = pick_device(options.device), Config(model=options.model, data_output=options.data_output)
    build_net = lambda: build(config, (options.channels, options.size, options.size), options.classes)
    flops = flops_per_image(build_net())
    dtypes = [pick_dtype(name, device) for name in options.dtypes.split(",")]
    if options.baseline and torch.float32 not in dtypes:
        dtypes.append(torch.float32)
    rates = {dtype: product_rate(device, dtype) for dtype in dtypes}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}; {options.model} on {options.channels}x{options.size}x{options.size}: {flops / 1e9:.3f} GFLOP a picture forward; "
          f"matrix products {', '.join(f'{rate / 1e12:.3g} TFLOP/s in {str(dtype)[6:]}' for dtype, rate in rates.items())}")
    print("\n| what | batch | dtype | compiled | ms | images/s | TFLOP/s | of the limit | first call, s | memory, GiB |\n|---|---|---|---|---|---|---|---|---|---|")
    for what, batch, dtype, compiled, call, units in rows(options, device, rates, build_net):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, first = timed(call, device, options.seconds)
        speed = batch * units * flops / seconds
        print(f"| {what} | {batch} | {str(dtype)[6:]} | {'yes' if compiled else 'no'} | {seconds * 1e3:.1f} | {batch / seconds:.0f} | {speed / 1e12:.3g} "
              f"| {speed / rates[dtype]:.1%} | {first:.1f} | {peak_memory(device):.2f} |", flush=True)
    if device.type == "cpu":
        data = Shapes(options.size)
        seconds, _ = timed(lambda: data[range(64)], device, min(options.seconds, 1))
        print(f"\nrendering 64 shapes: {seconds * 1e3:.2f} ms")


if __name__ == "__main__":
    try:
        main(Options(**read_flags(Options, sys.argv[1:], __doc__)))
    except ValueError as error:
        fail(error)
