"""What a script runs on: processes, device, precision, signals, and the step that skips what is not finite.

On one process every distributed call here does nothing, so a laptop and a cluster read the same lines.
"""
import contextlib
import ctypes
import datetime
import os
import shutil
import signal
import socket
import sys
import threading
import time
import timeit
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

GRACE = 120         # seconds from a request to stop until the process leaves without saving
MAX_SKIPPED = 100   # steps in a row that are not finite, after which the run ends


def run(script):
    """Call script(). A ValueError raised in this repository is one line for the user, and status 2; anything
    else is a bug, and has its traceback."""
    try:
        script()
    except Exception as error:
        origin, here = traceback.extract_tb(error.__traceback__)[-1], Path(__file__).resolve().parent
        ours = Path(origin.filename).resolve().parent in (here, here / "experiments")
        if isinstance(error, ValueError) and ours and origin.line.startswith("raise"):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        if rank_and_world()[1] == 1:
            raise
        traceback.print_exc()       # a peer is lost: leave at once, a goodbye would wait for it
        os._exit(1)


def one_line(error):
    """The first line of what an exception says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- processes ----------------------------------------------------------------------------------------

def rank_and_world():
    """(rank, number of processes), as torchrun has set them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(*words):
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


def rank_batches(count, batch_size, rank, world):
    """The first index of each of this process's batches. Batches are the same for any number of processes."""
    return range(rank * batch_size, count, world * batch_size)


def init_distributed(device=None, timeout=datetime.timedelta(minutes=30)):
    """Enter the process group, if there are several: nccl for a GPU, else gloo. Returns a group on the CPU
    for what processes tell each other beside the tensors, or None."""
    rank, world = rank_and_world()
    if world == 1:
        return None
    env, store = os.environ, None
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
        # one agent keeps its store over restarts, with the addresses of dead peers: use a new prefix
        agent = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"restart{env['TORCHELASTIC_RESTART_COUNT']}", agent)
    on_gpu = device is not None and device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world,
                            timeout=timeout)
    return dist.new_group(backend="gloo", timeout=timeout)


def leave_distributed():
    """Nobody leaves while another still listens."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gather(value, group):
    """The values of all processes, in a list, in every process."""
    if group is None:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def from_rank0(make, group):
    """make() of process 0, in every process."""
    return gather(make() if rank_and_world()[0] == 0 else None, group)[0]


def sum_over_ranks(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# ---- device and precision -----------------------------------------------------------------------------

def pick_device(wanted):
    """A torch.device, this process's own if there are several."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [name for name in there if there[name]]
    name = there[0] if wanted == "auto" else wanted
    if name not in there:
        raise ValueError(f"device {wanted!r} is not available; use one of: {', '.join(there)}")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if name == "cuda":
        torch.cuda.set_device(device)           # streams and graphs are of this one
    if name == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Without this glibc hands freed memory back to the system, and the next step of a small network spends a
    tenth of its time on getting it again. Limits that are set in the environment stay."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):       # other systems have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back
        mallopt(-3, 2**25)      # M_MMAP_THRESHOLD: keep blocks of up to 32 MiB; larger ones leave gaps


def pick_dtype(wanted, device):
    """The dtype of the matrix products; "auto": bfloat16 where it is faster, on a CPU by a try."""
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
    """torch.compile is of no use on mps, and on a CPU needs a C++ compiler."""
    return device.type == "cuda" or device.type == "cpu" and bool(shutil.which(os.environ.get("CXX", "g++")))


def fix_order(device, compiled, exact):
    """Give sums a fixed order, so that the same command gives the same bits. On a CPU in compiled code, where
    two threads would add up the gradient of the classes in any order. On a GPU, where attention, index_add
    and cuBLAS would, only if `exact`: that costs some percent. ValueError when cuBLAS is set otherwise."""
    on = exact if device.type == "cuda" else compiled and device.type == "cpu"
    if on and device.type == "cuda" and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        raise ValueError("exact wants CUBLAS_WORKSPACE_CONFIG=:4096:8, as it is if nobody sets it: unset it")
    torch.use_deterministic_algorithms(on)              # with warn_only attention would be in any order
    torch.utils.deterministic.fill_uninitialized_memory = False         # a help in debugging that costs time


def wrap(net, device, compiled, fsdp=False):
    """The network as the loop calls it: DDP where there are several processes. It is compiled block by block
    (in place), so that equal blocks are compiled once: XL starts in seconds. On a CPU the whole network is
    compiled: that starts in twice the time, and its steps are 9 % faster."""
    model, on_cpu = net, device.type == "cpu"
    if compiled and not on_cpu:
        for block in [*net.blocks, *filter(None, [getattr(net, "final_layer", None)])]:  # not all have one
            block.compile()
    if rank_and_world()[1] > 1 and not fsdp and any(p.requires_grad for p in net.parameters()):
        model = DistributedDataParallel(net, broadcast_buffers=False)
    if compiled and on_cpu:
        model = torch.compile(model)
    model.num_classes = net.num_classes     # the objective reads it; DDP and compile hide it
    return model


class Graphed:
    """call(*tensors) -> a tensor, as one CUDA graph: recorded once, then replayed by one launch in place of
    hundreds, for which a small network waits longer than for its arithmetic. The first calls are plain ones,
    which compile and set up: at least three, until ready(). Inputs of another shape go to `call` itself.

    A replay reads and writes the memory of the recording and runs no Python. So what changes from call to
    call must be in tensors: a Python number keeps the value that it had. `call` may not read a tensor's
    value.
    """

    def __init__(self, call, ready=lambda: True):
        self.call, self.ready, self.graph = call, ready, None
        self.shapes, self.plain_calls, self.stream = None, 0, torch.cuda.Stream()

    def aside(self, inputs):
        """A plain call on the stream that records."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            output = self.call(*inputs)
        here.wait_stream(self.stream)
        return output

    def record(self, inputs):
        self.inputs, graph = [value.clone() for value in inputs], torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()            # the casts of the weights are a part of it, and end with it
        try:                                    # thread_local: other threads read batches meanwhile
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.output = self.call(*self.inputs)
        except RuntimeError as error:
            error.add_note("this cannot be recorded as a CUDA graph: take train.py --no-compile (its models "
                           "are drawn without one, too), or sample.open_model(graph=False)")
            raise
        torch.clear_autocast_cache()
        self.graph = graph

    def __call__(self, *inputs):
        shapes = [value.shape for value in inputs]
        if self.graph is None:
            if shapes != self.shapes:
                self.shapes, self.plain_calls = shapes, 0
            if self.plain_calls < 3 or not self.ready():
                self.plain_calls += 1
                return self.aside(inputs)
            self.record(inputs)
        if shapes != self.shapes:
            return self.call(*inputs)
        for mine, value in zip(self.inputs, inputs):
            mine.copy_(value)
        self.graph.replay()
        return self.output.clone()


def gradient_sync(net, model, on):
    """A context: does this backward pass send its gradients to the other processes? Once a step is enough."""
    if hasattr(net, "set_requires_gradient_sync"):              # FSDP2
        net.set_requires_gradient_sync(on)
    return contextlib.nullcontext() if on or not hasattr(model, "no_sync") else model.no_sync()


def not_finite_to_nan(loss):
    """The mean of a loss (B,), with gradient NaN if one is not finite: that of an infinite loss is 0, and
    would not be noticed."""
    return loss.mean() * torch.where(loss.detach().isfinite().all(), 1.0, torch.nan)


def clip_gradient(net, largest):
    """Clip to `largest` (0: do not); returns the norm over all processes, a scalar on the device."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), largest or float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def optimizer_step(optimizer, finite):
    """One step, or none where the gradient is not finite (a bool tensor on the device). Fused optimisers, as
    all of ours are, look at found_inf themselves; for another one the host waits for that number."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Skipped:
    """Counts the steps that optimizer_step left out, on the device, so that counting does not wait for it."""

    def __init__(self, device):
        # since the last report; in a row; the largest t of a loss that was not finite, or -1
        self.counts, self.in_a_row = torch.tensor([0.0, 0.0, -1.0], device=device), 0

    def look(self, loss, t):
        """Remember the times t (B,) at which the loss (B,) is not finite."""
        self.counts[2] = torch.where(loss.isfinite(), self.counts[2], t).max()

    def add(self, finite):
        self.counts[0] += ~finite
        self.counts[1] = (self.counts[1] + 1) * ~finite

    def take(self, step, group, tell):
        """How many since the last report, and tell(line) of them; begin anew."""
        lost, self.in_a_row, bad_t = self.counts.tolist()
        self.counts[0], self.counts[2] = 0, -1
        if lost:
            times = enumerate(gather(bad_t, group))
            seen = ", ".join(f"t = {t:.3f} on process {rank}" for rank, t in times if t >= 0)
            what = f"the loss, up to {seen}," if seen else "the gradient"
            tell(f"step {step}: {lost:.0f} steps skipped: {what} is not finite")
        return int(lost)

    def check(self, step):
        if self.in_a_row >= MAX_SKIPPED:
            raise ValueError(f"{self.in_a_row:.0f} steps up to step {step} were not finite: check the data "
                             "or lower --lr, and resume with --allow_change")


# ---- signals ------------------------------------------------------------------------------------------

STOP = (signal.SIGTERM, signal.SIGINT)
SAVE = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()      # Windows has none


class Signals:
    """SIGTERM and Ctrl-C ask to stop, SIGUSR1 to save: flags that all processes agree on once a step.

    After a request to stop there are GRACE seconds: if a peer is lost, the step that waits for it never ends.
    A thread counts them, since Python runs no handler while the main thread is inside such a step.
    """

    def __init__(self, group):
        self.flags, self.group = torch.zeros(2, dtype=torch.int32), group

    def __enter__(self):
        self.before = {number: signal.signal(number, self.hear) for number in STOP + SAVE}
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        signal.set_wakeup_fd(self.writer.fileno())  # the system writes every signal there, at once
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *error):
        signal.set_wakeup_fd(-1)
        self.writer.close()                         # the watcher then ends
        self.watcher.join()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def hear(self, number, frame):
        self.flags[0 if number in STOP else 1] = number

    def watch(self):
        """Leave, without saving, when GRACE is over or somebody asks to stop a second time."""
        asked = None
        while True:
            try:
                number = self.reader.recv(1)
            except TimeoutError:
                break
            if not number:                          # the run is over
                return
            if number[0] in STOP:
                if asked and time.monotonic() - asked > 5:      # a terminal and torchrun both send Ctrl-C
                    break
                asked = asked or time.monotonic()
                self.reader.settimeout(GRACE)
        os.write(2, b"\nstopped without saving: the same command resumes from the last checkpoint\n")
        os._exit(1)

    def agree(self):
        """(signal to stop for or 0, whether to save): the same answer in every process."""
        flags, self.flags[1] = self.flags.clone(), 0
        if self.group is not None:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return flags.tolist()
