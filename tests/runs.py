"""What the tests of runs share: train.py in this process or by torchrun, and the comparison of two runs."""
import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from toys import ROOT, TINY, run, states

from model import FAMILIES, DiT

# The network of tests/old_run: a step takes a few milliseconds. Register it as model.MODELS["TiT-nano/4"].
TIT_NANO = partial(DiT, patch_size=4, depth=1, hidden_size=16, num_heads=2, **FAMILIES["TiT"])
FLAGS = [*TINY, "--sample_steps", "2"]
NANO = [*FLAGS, "--model", "TiT-nano/4"]
TEACH = "--zeta 0.5 --style ft-vs-fe".split()
FEW = "--lam 1 --zeta 1 --style fc-vs-xz --optimizer radam --init_from start".split()
TUNE = ("--lam 1 --derivative jvp --zeta 1.5 --style fc-vs-fe --huber 5 --ema 0.99,0.9 "
        "--init_from start").split()
RUNS = {"many-step": TEACH, "few-step": FEW, "tuning": TUNE, "muon": ["--optimizer", "muon", *TEACH]}


def train(*flags, capsys):
    """train.py in this process; returns what it prints."""
    status, out, err = run("train.py", *FLAGS, *flags, capsys=capsys)
    assert status == 0, err
    return out


def refused(*flags, capsys):
    """What train.py says on stderr when it ends with status 2."""
    status, out, err = run("train.py", *FLAGS, *flags, capsys=capsys)
    assert status == 2 and err.strip() and "Traceback" not in err, out + err
    return err


train_nano, refused_nano = (partial(call, "--model", "TiT-nano/4") for call in (train, refused))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(processes, *more):
    """The command up to the script."""
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
            f"--master_port={free_port()}", *more]


def train_on(processes, *flags):
    """train.py on several processes."""
    command = [*torchrun(processes), str(ROOT / "train.py"), *FLAGS, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def workers_of(agent, script):
    """The processes that torchrun has started to run the script."""
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in found}
    return [pid for pid, line in lines.items() if script in line and "torch.distributed.run" not in line]


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def reached(out):
    """The step of the newest state."""
    return int(states(out)[-1].name[6:14])


def assert_same(one, other):
    """The newest states of two runs are equal bit for bit: weights, averages, teacher, optimiser."""
    one, other = load_file(states(one)[-1]), load_file(states(other)[-1])
    assert one.keys() == other.keys() and any(name.startswith("optimizer.") for name in one)
    for name in one:
        assert_close(one[name], other[name], rtol=0, atol=0, msg=name)


def distance(one, other):
    """|w1 - w2| / |w1| of the weights in the newest states of two runs."""
    def weights(out):
        tensors = load_file(states(out)[-1])
        return torch.cat([v.flatten() for name, v in sorted(tensors.items()) if name.startswith("net.")])
    one, other = weights(one), weights(other)
    return ((one - other).norm() / one.norm()).item()
