"""What decides how training scales: bytes all-reduced a step, how much of that hides behind the backward pass, and the arithmetic.

    torchrun --nproc_per_node=2 experiments/overlap.py              # two gloo processes on this machine, from the profiler's trace
    python experiments/overlap.py                                   # only the arithmetic: XL on 8, 64 and 512 GPUs
"""
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import MODELS
from objective import Objective


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
    return sum(max(0, min(e1, e2) - max(s1, s2)) for s1, e1 in a for s2, e2 in b)


def trace():
    """Share of the all-reduce's time during which the backward pass is computing too, on two processes."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = MODELS["TiT-S/2"](input_size=16, in_channels=4, num_classes=10)
    model, objective = DistributedDataParallel(net, broadcast_buffers=False), Objective("linear")
    model.num_classes = 10
    x, y = torch.randn(16, 4, 16, 16), torch.zeros(16, dtype=torch.int64)

    def step():
        objective(model, x, y, *objective.draw(x, y)).mean().backward()
    for _ in range(3):
        step()
    with profile() as seen:
        step()
    events = [(e.name, (e.time_range.start, e.time_range.end)) for e in seen.events()]
    reduce = union(span for name, span in events if "all_reduce" in name or "allreduce" in name)
    backward = union(span for name, span in events if name.startswith("autograd::engine::evaluate_function"))
    total, hidden = sum(e - s for s, e in reduce), common(reduce, backward)
    if dist.get_rank() == 0:
        count = sum(p.numel() for p in net.parameters() if p.requires_grad)
        print(f"TiT-S/2, {count / 1e6:.1f} M gradients = {4 * count / 2**20:.0f} MiB a step in {len(reduce)} spans of all-reduce, {total / 1e3:.0f} ms; "
              f"{hidden / total:.0%} of it while the backward pass computes ({sum(e - s for s, e in backward) / 1e3:.0f} ms)")
    dist.destroy_process_group()


def predict(parameters=674.9e6, images_per_s=600, batch=128):
    """Efficiency of data parallelism by GPUs: the ring all-reduce moves 2 (n - 1) / n of 4 bytes a parameter through the slowest link."""
    step = batch / images_per_s
    print(f"XL: {4 * parameters / 1e9:.2f} GB of gradients; assumed {images_per_s} images/s a GPU, {batch} a GPU and step: {step * 1e3:.0f} ms; "
          "efficiency without overlap, and with all but the last 4 % behind the backward pass")
    for n, link, bandwidth in ((8, "NVLink, 300 GB/s", 300e9), (64, "InfiniBand, 50 GB/s a GPU", 50e9), (64, "Ethernet, 100 Gbit/s a node of 8", 12.5e9 / 8),
                               (512, "InfiniBand, 50 GB/s a GPU", 50e9)):
        wire = 2 * (n - 1) / n * 4 * parameters / bandwidth
        backward = step * 2 / 3
        exposed = max(0.04 * wire, wire - backward)
        print(f"| {n} | {link} | {wire * 1e3:.0f} ms | {step / (step + wire):.0%} | {step / (step + exposed):.0%} |")


if __name__ == "__main__":
    if "RANK" in os.environ:
        trace()
    else:
        predict()
