"""How training scales: bytes all-reduced a step, and how much of that hides behind the backward pass.

    torchrun --nproc_per_node=2 experiments/overlap.py      # measured: gloo processes on one machine (Linux)
    python experiments/overlap.py                           # arithmetic: XL on 8, 64 and 512 GPUs

The measurement is from the profiler's trace: the share of the all-reduce's time in which the backward pass
computes, on process 0. The bytes sent are those that the loopback interface counts, by whichever program.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import read_flags, setting
from engine import init_distributed, leave_distributed, print0, run
from model import MODELS
from objective import Objective

# GPUs, their slowest link, and its bytes/s for each GPU
LINKS = ((8, "NVLink, 300 GB/s", 300e9), (64, "InfiniBand, 50 GB/s a GPU", 50e9),
         (64, "Ethernet, 100 Gbit/s a node of 8", 12.5e9 / 8), (512, "InfiniBand, 50 GB/s a GPU", 50e9))

STEPS = 10


@dataclass
class Options:
    model: str = setting("TiT-S/2", "under torchrun: the network whose step is traced")
    parameters: float = setting(674.9e6, "of the network of the arithmetic")
    images_per_s: float = setting(544.0, "of one GPU; XL on an H200, batch 128")
    batch: int = setting(128, "images a GPU and step")


def union(spans):
    """Disjoint intervals that cover the same points."""
    merged = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    return merged


def common(a, b):
    """The length of what two unions share."""
    return sum(max(0, min(e1, e2) - max(s1, s2)) for s1, e1 in a for s2, e2 in b)


def length(spans):
    return sum(end - start for start, end in spans)


def sent():
    """Bytes that the loopback interface has sent since the machine was started."""
    return int(Path("/proc/net/dev").read_text().partition("lo:")[2].split()[8])


def measure(options):
    """Steps of several processes, profiled, and the bytes that they send."""
    init_distributed()
    world = dist.get_world_size()
    torch.manual_seed(0)
    net = MODELS[options.model](input_size=16, in_channels=4, num_classes=10)
    model, objective = DistributedDataParallel(net, broadcast_buffers=False), Objective("linear")
    model.num_classes = 10
    x, y = torch.randn(16, 4, 16, 16), torch.zeros(16, dtype=torch.int64)

    def step():
        objective(model, x, y, *objective.draw(x)).mean().backward()
    for _ in range(3):
        step()
    dist.barrier()
    before = sent()
    with profile() as seen:
        for _ in range(STEPS):
            step()
    dist.barrier()
    each = (sent() - before) / world / STEPS
    events = [(e.name, (e.time_range.start, e.time_range.end)) for e in seen.events()]
    reduce = union(span for name, span in events if "all_reduce" in name or "allreduce" in name)
    backward = union(span for name, span in events if name.startswith("autograd::engine::evaluate_function"))
    size = 4 * sum(p.numel() for p in net.parameters() if p.requires_grad)
    hidden, took = common(reduce, backward) / length(reduce), length(reduce) / 1e3 / STEPS
    print0(f"{options.model}, {world} processes, per step: {size / 2**20:.2f} MiB of gradients; each "
           f"process sends {each / 2**20:.2f} MiB, in a ring {2 * (world - 1) / world * size / 2**20:.2f}; "
           f"all-reduce {took:.0f} ms, {hidden:.0%} of it while the backward pass computes "
           f"({length(backward) / 1e3 / STEPS:.0f} ms), {(1 - hidden) * took:.0f} ms of waiting")
    leave_distributed()


def predict(options):
    """Efficiency of data parallelism. A ring all-reduce moves 2 (n - 1) / n of all bytes through the slowest
    link."""
    step, size = options.batch / options.images_per_s, 4 * options.parameters
    print(f"{size / 1e9:.2f} GB of gradients; {options.images_per_s:g} images/s a GPU, "
          f"{options.batch} a GPU and step: {step * 1e3:.0f} ms\n")
    print("| GPUs | slowest link | on the wire | efficiency without overlap | with all but 4 % hidden |")
    print("|---|---|---|---|---|")
    for n, link, bandwidth in LINKS:
        wire = 2 * (n - 1) / n * size / bandwidth
        exposed = max(0.04 * wire, wire - step * 2 / 3)         # the backward pass is two thirds of a step
        plain, overlapped = step / (step + wire), step / (step + exposed)
        print(f"| {n} | {link} | {wire * 1e3:.0f} ms | {plain:.0%} | {overlapped:.0%} |")


if __name__ == "__main__":
    task = measure if "RANK" in os.environ else predict
    run(lambda: task(Options(**read_flags(Options, sys.argv[1:], __doc__))))
