"""What a script runs on: processes, device and precision, signals, and files that are never half-written.

With one process every distributed call here does nothing, so a laptop and a cluster run the same lines.
"""
import contextlib
import ctypes
import datetime
import errno
import hashlib
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
import timeit
import traceback
from pathlib import Path

import filelock
import safetensors
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from config import UserError, command_line

UMASK = os.umask(0)
os.umask(UMASK)     # the only way to read it is to set it


def run(script):
    """Call script(). A UserError is printed in one line, with exit status 2; anything else is a bug and keeps
    its traceback."""
    for stream in (sys.stdout, sys.stderr):     # print a character that the console lacks as its code
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    try:
        command_line(lambda flags: script())
    except Exception:
        if rank_and_world()[1] == 1:
            raise
        traceback.print_exc()       # leave at once: closing the group would wait for a peer that may be lost
        os._exit(1)


def one_line(error):
    """The first line of an exception's message, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- processes ----------------------------------------------------------------------------------------

def rank_and_world():
    """(rank, number of processes), as set by torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(*words):
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


def rank_batches(count, batch_size):
    """The first index of each of this process's batches, which are the same for any number of processes."""
    rank, world = rank_and_world()
    return range(rank * batch_size, count, world * batch_size)


def init_distributed(device=None, timeout=datetime.timedelta(minutes=30)):
    """Join the process group if there are several processes: nccl on a GPU, else gloo. Returns a second
    group, on the CPU, for everything that is not a tensor on the device; None with one process."""
    rank, world = rank_and_world()
    if world == 1:
        return None
    env, store = os.environ, None
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
        # the agent keeps its store across restarts, with the addresses of dead peers: use a new prefix
        agent = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"restart{env['TORCHELASTIC_RESTART_COUNT']}", agent)
    on_gpu = device is not None and device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world,
                            timeout=timeout)
    return dist.new_group(backend="gloo", timeout=timeout)


def leave_distributed():
    """Wait for all processes, then close the group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gather(value, group=None):
    """A list of the values of all processes, in every process. group: of init_distributed, or the default."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def from_rank0(make, group=None):
    """What make() returns on process 0, in every process."""
    return gather(make() if rank_and_world()[0] == 0 else None, group)[0]


def sum_over_ranks(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# ---- device and precision -----------------------------------------------------------------------------

def pick_device(wanted):
    """A torch.device; with several processes per machine, each has its own GPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    names = [name for name in available if available[name]]
    name = names[0] if wanted == "auto" else wanted
    if name not in names:
        raise UserError(f"device {wanted!r} is not available; use one of: {', '.join(names)}")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if name == "cuda":
        torch.cuda.set_device(device)           # for streams and graphs, which take the current device
    if name == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """By default glibc returns freed memory to the system, and a small network's next step spends a tenth of
    its time getting it back. Limits set in the environment are respected."""
    with contextlib.suppress(AttributeError):           # macOS has no mallopt
        if not any(name.startswith("MALLOC_") for name in os.environ):
            ctypes.CDLL(None).mallopt(-1, 2**31 - 1)    # M_TRIM_THRESHOLD: return nothing
            ctypes.CDLL(None).mallopt(-3, 2**25)        # M_MMAP_THRESHOLD: keep blocks of up to 32 MiB


def spare_threads():
    """The number of cores that other programs leave idle, at least 1, measured for a fifth of a second; 0 if
    that is no fewer than the threads torch would use, or the environment sets them, or the system is not
    Linux. A thread that shares its core slows all the others down."""
    if "OMP_NUM_THREADS" in os.environ or not os.path.exists("/proc/stat"):
        return 0
    ticks = lambda: [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    before = ticks()
    time.sleep(0.2)
    spent = [after - n for n, after in zip(before, ticks())]  # 3: idle, 4: waiting for a disk
    idle = max(1, round(os.cpu_count() * (spent[3] + spent[4]) / max(1, sum(spent))))
    return idle if idle < torch.get_num_threads() else 0


def pick_dtype(wanted, device):
    """The dtype of the matrix products. "auto": bfloat16 where it is faster, which on a CPU is measured. Not
    float16, which would need loss scaling."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device.type != "cpu":
        return torch.float32

    def seconds(dtype):
        a = torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=1, repeat=6))
    return torch.bfloat16 if 1.5 * seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def can_compile(device):
    """torch.compile does not help on mps, and needs a C++ compiler on a CPU."""
    return device.type == "cuda" or device.type == "cpu" and bool(shutil.which(os.environ.get("CXX", "g++")))


def fix_order(device, compiled, exact):
    """Give sums a fixed order, so that the same command gives the same bits. On a CPU this concerns compiled
    code, where two threads add up the gradient of the class embedding in any order. On a GPU it concerns
    attention, index_add and cuBLAS; there it costs a few per cent, so it is done only if `exact`."""
    on = exact if device.type == "cuda" else compiled and device.type == "cpu"
    torch.use_deterministic_algorithms(on)              # not warn_only: attention would ignore it
    torch.utils.deterministic.fill_uninitialized_memory = False         # a debugging aid that costs time


def wrap(net, device, compiled, fsdp=False):
    """The network as the loop calls it: in DDP if there are several processes, and compiled. On a GPU it is
    compiled block by block, in place, so that equal blocks are compiled once and XL starts in seconds. On a
    CPU it is compiled whole, which doubles the start-up time and makes steps 9 % faster."""
    model, on_cpu = net, device.type == "cpu"
    if compiled and not on_cpu:
        for block in net.blocks:
            block.compile()
        if hasattr(net, "final_layer"):
            net.final_layer.compile()
    if rank_and_world()[1] > 1 and not fsdp and any(p.requires_grad for p in net.parameters()):
        model = DistributedDataParallel(net, broadcast_buffers=False)
    if compiled and on_cpu:
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)      # it warns about CUDA
        model = torch.compile(model)
    model.num_classes, model.null = net.num_classes, getattr(net, "null", None)     # which DDP hides
    return model


def gradient_sync(net, model, on):
    """A context in which backward averages gradients over the processes only if `on`: once per step is
    enough."""
    if hasattr(net, "set_requires_gradient_sync"):              # FSDP2
        net.set_requires_gradient_sync(on)
    return contextlib.nullcontext() if on or not hasattr(model, "no_sync") else model.no_sync()


# ---- signals ------------------------------------------------------------------------------------------

SAVE_AFTER = 600        # seconds without a checkpoint after which a run saves
STOP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
SAVE = signal.SIGUSR1


class Signals:
    """SIGTERM, Ctrl-C and a closed terminal ask to stop, SIGUSR1 asks to save: flags on which all processes
    agree once per step. A second request to stop, five seconds after the first, exits without saving."""

    def __init__(self, group):
        self.flags, self.group, self.asked = torch.zeros(2, dtype=torch.int32), group, math.inf
        self.saved = time.monotonic()

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.hear) for number in (*STOP, SAVE)}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def hear(self, number, frame):
        if number == SAVE:
            self.flags[1] = number
            return
        if time.monotonic() - self.asked > 5:       # not the same request, sent by both SLURM and torchrun
            os.write(2, b"\nstopped without saving: the same command resumes from the last checkpoint\n")
            os._exit(1)
        self.asked = min(self.asked, time.monotonic())
        self.flags[0] = number

    def agree(self):
        """[signal to stop for, whether to save now], each 0 if not: the same in every process. A save is due
        on SIGUSR1, and SAVE_AFTER seconds after the last save (self.saved)."""
        if time.monotonic() - self.saved > SAVE_AFTER:
            self.flags[1] = 1
        flags, self.flags[1] = self.flags.clone(), 0
        if self.group is not None:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return flags.tolist()


# ---- files that stay whole ----------------------------------------------------------------------------

def flush(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def checksum(path):
    """Sixteen hexadecimal digits that identify the bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def atomic_write(path, write, name=None):
    """Call write(temporary path), flush, rename: `path` always holds either the old bytes or all of the new.
    name(temporary path): the file's name, if it depends on the bytes written. Returns the path."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with contextlib.suppress(OSError):      # not every file system has modes
            os.chmod(temporary, 0o666 & ~UMASK)
        flush(temporary)
        if name:
            path = path.with_name(name(temporary))
        os.replace(temporary, path)
        with contextlib.suppress(OSError):      # nor does every one let a folder be flushed
            flush(path.parent)
        return path
    finally:
        temporary.unlink(missing_ok=True)


TRANSIENT = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN}


@contextlib.contextmanager
def ignore_disk_errors(what, tell, transient=TRANSIENT):
    """A full or failing disk does not end a run: tell(line) and go on. An error whose number is not in
    `transient` becomes a UserError; None: ignore every error."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        number = re.search(r"(?:Errno|os error) (\d+)", str(error))     # safetensors has it only in its text
        if transient and not (number and int(number[1]) in transient):
            raise UserError(f"{what} cannot be written ({error})") from error
        tell(f"{what} could not be written ({error}): the run goes on; free some disk space")


def check_writable(folder):
    """UserError if files cannot be written into `folder`, which need not exist and is not made."""
    above = Path(folder).absolute()
    while not os.path.exists(above):
        above = above.parent
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"cannot write into {folder} ({above} is not a folder that you may write to): "
                        "give another --out")


def claim_folder(out):
    """Create a folder and keep other runs out of it, until the lock returned is released or the process ends.
    UserError: the folder cannot be written, or another process holds it."""
    path = Path(out) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        lock.acquire(timeout=0)
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except filelock.Timeout as error:
        raise UserError(f"{out} is in use by {path.read_text()}: stop it, or give another --out") from error
    except OSError as error:
        raise UserError(f"cannot write into {out} ({error}): give another --out") from error
    return lock


def locked(folder):
    """A context in which one process at a time works; the others then find what it made. A folder that cannot
    be written, or None, is not locked."""
    with contextlib.suppress(OSError):          # whoever writes there will report it
        Path(folder or "").mkdir(parents=True, exist_ok=True)
    if folder and os.access(folder, os.W_OK):
        return filelock.FileLock(Path(folder) / ".lock-data")
    return contextlib.nullcontext()


@contextlib.contextmanager
def as_one_error(what, hint):
    """Whatever goes wrong inside becomes a UserError of one line. A damaged file can raise almost any
    exception, and the hub's library raises different ones in each version."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} ({one_line(error)}): {hint}") from error
