"""Where to run: the device, the precision, and one process among several."""
import os
import shutil
import timeit

import torch
import torch.distributed as dist


def pick_device(wanted):
    """A torch.device, of this process if there are several; "auto" is cuda, mps or cpu, the first that is there. ValueError if the
    wanted one is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in there if there[name]) if wanted == "auto" else wanted
    if not there.get(name):
        raise ValueError(f"device {wanted!r} is not available; this machine has: {', '.join(n for n in there if there[n])}")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def pick_dtype(wanted, device):
    """The dtype of the matrix products; "auto" is bfloat16 where it is faster: on GPUs that have it, on CPUs by a try."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type != "cpu":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32

    def seconds(dtype):
        a = torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=1, repeat=6))
    return torch.bfloat16 if 1.5 * seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32


def can_compile(device):
    """Whether torch.compile is of use here: not on mps, and on a CPU only with a C++ compiler."""
    return device.type == "cuda" or device.type == "cpu" and bool(shutil.which(os.environ.get("CXX", "g++")))


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def join(device, rank, world):
    """Enter the process group: nccl on GPUs, gloo elsewhere."""
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # torchrun keeps one store over its restarts: without a prefix, a restarted process finds the addresses of dead peers there
        agent = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"restart{os.environ['TORCHELASTIC_RESTART_COUNT']}", agent)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)


def place():
    """(rank, number of processes), as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(*words):
    if place()[0] == 0:
        print(*words, flush=True)


def deal(count, batch_size, rank, world):
    """The first index of each of this process's batches: batches do not depend on the number of processes, only their owner does."""
    return range(rank * batch_size, count, world * batch_size)
