"""Where a tuning to few steps falls over: a line a step with the part of the network that pulls hardest and the times that are worst.

    python experiments/fall.py --recipe mnist-few --init_from runs/mnist --steps 360 --consistency_ratio 0.96      # flags as for train.py
    python experiments/fall.py --recipe mnist-few --init_from runs/mnist --look 80                                 # only the first 80 steps

The steps are those of train.py on one process, not compiled. "norm" is the gradient's before clipping; "share" is the part's share of it.
"""
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import load_model
from config import fail, read_config
from data import open_dataset
from machine import autocast, pick_device, pick_dtype
from train import dealt_blocks, draw, learning_rate, make_optimizer, positions, split_batch, update


def main(config, look):
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    net, _, _ = load_model(config.init_from, device)
    teacher = copy.deepcopy(net)                                    # frozen, as it was loaded
    net.requires_grad_(True)
    data, objective, accumulate = open_dataset(config.data, config.image_size or None, config.seed, config.labels, config.data_dir), config.objective(), split_batch(config, 1)
    data.hold_out(config.held_out)
    optimizer, generator = make_optimizer(config, net, dtype), torch.Generator(device)
    for step, places in zip(range(min(look, config.steps)), positions(config, 0, 1, accumulate, 0)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        x, y = (v.to(device) for v in data[places])
        t, z, drop = draw(objective, x, y, config.seed, step, dealt_blocks(config, 1, accumulate, 0, 0), generator)
        with autocast(device, dtype):
            loss = objective(net, x, y, t, z, drop, teacher)
        loss.mean().backward()
        pulls = {}
        for name, weight in net.named_parameters():
            part = name.split(".")[0] if not name.startswith("blocks.") else "blocks " + name.split(".")[2]
            pulls[part] = pulls.get(part, 0.0) + weight.grad.square().sum().item()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip or torch.inf)
        hardest = max(pulls, key=pulls.get)
        worst = " ".join(f"{t[k]:.3f}" for k in loss.detach().topk(5).indices)
        share = (pulls[hardest] / sum(pulls.values())) ** 0.5
        print(f"step {step + 1:4d}   loss {loss.mean():.3f}   norm {norm:8.2f}   share {share:.2f} {hardest:24s} worst t {worst}", flush=True)
        update(optimizer, norm.isfinite())


if __name__ == "__main__":
    words = sys.argv[1:]
    look = int(words.pop(words.index("--look") + 1)) if "--look" in words else 10**9
    words = [word for word in words if word != "--look"]
    try:
        main(read_config(words, __doc__), look)
    except ValueError as error:
        fail(error)
