"""How much memory does training take? Counts the tensors that autograd keeps, without allocating any.

    python experiments/memory.py                                    # the table of docs/cluster.md
    python experiments/memory.py --check TiT-S/1                    # the count, and the peak of this process

What does not depend on the batch, per parameter: 4 bytes each for the weight, its gradient, two moments of
AdamW and one average; 4 more for a teacher; 2 for the bfloat16 copy that autocast keeps. What grows with the
batch: the activations of one forward pass, each storage counted once. Not counted: what torch.compile fuses
away, workspaces, and fragmentation.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import read_flags, setting
from engine import run
from log import peak_memory
from model import MODELS
from objective import Objective


@dataclass
class Options:
    models: str = setting("TiT-S/1,TiT-B/1,TiT-L/1,TiT-XL/1", "networks, on latents of 16x16x32")
    batches: str = setting("1,4,16,64", "images per GPU")
    check: str = setting("", "measure this network on the CPU instead, with a batch of 16")


OBJECTIVE = Objective()


def loss_of(net, batch):
    """The loss of a step with lam 0, as train.py computes it."""
    x, z = torch.randn(2, batch, 32, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        t, y, drop = torch.rand(batch), torch.zeros(batch).long(), torch.zeros(batch).bool()
        return OBJECTIVE(net, x, y, t, z, drop).mean()


def kept(net, compute):
    """Bytes that autograd keeps for the backward pass of compute(), those of the weights of net left out."""
    own, found = {p.untyped_storage()._cdata for p in net.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage         # held, so that no other takes its address
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compute()
    assert loss.requires_grad       # and is alive until here, with all that it keeps
    return sum(storage.nbytes() for storage in found.values())


def count(name, checkpointed):
    """(parameters, bytes kept at batch 0, bytes kept per image) of a network, counted at batches 1 and 3."""
    with FakeTensorMode():
        net = MODELS[name](input_size=16, in_channels=32, num_classes=1000)
        net.grad_checkpoint = checkpointed
        one, three = (kept(net, partial(loss_of, net, batch)) for batch in (1, 3))
    each = (three - one) / 2
    return sum(p.numel() for p in net.parameters()), one - each, each


def main(options):
    if options.check:
        torch.set_num_threads(1)
        net = MODELS[options.check](input_size=16, in_channels=32, num_classes=1000)
        cpu = torch.device("cpu")
        before = peak_memory(cpu)
        loss_of(net, 16).backward()
        measured = peak_memory(cpu) - before
        parameters, fixed, each = count(options.check, False)
        counted = (4 * parameters + fixed + 16 * each) / 2**30
        print(f"{options.check}: {counted:.2f} GiB by counting gradients and what is kept for 16 images, "
              f"{measured:.2f} GiB measured")
        return
    batches = [int(n) for n in options.batches.split(",")]
    print(f"| network | fixed | teacher | {' | '.join(f'batch {n}' for n in batches)} | the last with "
          "--grad_checkpoint |")
    print(f"|---|---|---|{'---|' * (len(batches) + 1)}")
    for name in options.models.split(","):
        parameters, fixed, each = count(name, False)
        _, less_fixed, less = count(name, True)
        base = 20 * parameters
        cells = [base, 4 * parameters, *(base + fixed + n * each for n in batches),
                 base + less_fixed + batches[-1] * less]
        print(f"| {name} | {' | '.join(f'{cell / 2**30:.1f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    run(lambda: main(Options(**read_flags(Options, sys.argv[1:], __doc__))))
