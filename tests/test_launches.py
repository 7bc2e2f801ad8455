"""How a step is launched: memory that is kept, sums in a fixed order, no waiting for the device."""
import ctypes
import multiprocessing
import os
import platform
import signal

import pytest
import torch
import torch.distributed as dist
from runs import TIT_NANO
from torch.overrides import TorchFunctionMode

import engine
from config import Config
from experiments.bench import make_step
from log import LossByTime
from objective import TRANSPORTS, Objective
from optim import Skipped, make_optimizer, set_lr, update_ema
from train import draw

CPU = torch.device("cpu")


def networks(count):
    nets = [TIT_NANO(input_size=8, in_channels=3, num_classes=3) for _ in range(count)]
    for p in (p for net in nets for p in net.parameters()):
        torch.nn.init.normal_(p, std=0.1)
    return nets


def batches(objective, count):
    for step in range(count):
        x, y = torch.randn(16, 3, 8, 8), (torch.arange(16) + step) % 3
        yield x, y, *objective.draw(x, torch.Generator().manual_seed(step))


FEW = dict(lam=1.0, zeta=1.0, style="fc-vs-fe")
SETTINGS = [dict(), dict(zeta=0.5, style="ft-vs-fe"), dict(lam=0.5), FEW,
            FEW | dict(style="fc-vs-xz", derivative="backward", dt=0.05, huber=1.0, cosine_loss=True),
            FEW | dict(derivative="jvp"), *(dict(transport=name) for name in TRANSPORTS)]


def test_two_processes_know_of_each_other(tmp_path):
    """Their sums, all their values, the first one's alone, a request to stop that only one of them hears, and
    the mean of their gradients (2 rank) where it is asked for; without processes there is one of each."""
    def work(rank):
        dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=rank, world_size=2)
        signals = engine.Signals(dist.group.WORLD)
        if rank == 1:
            signals.hear(signal.SIGTERM, None)
        net, gradients = torch.nn.Linear(1, 1), []
        net.num_classes, net.null = 3, torch.zeros_like
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        model = engine.wrap(net, CPU, compiled=False)
        for on in (True, False):
            model.zero_grad()
            with engine.gradient_sync(net, model, on):
                model(torch.full((1, 1), 2.0 * rank)).sum().backward()
            gradients.append(net.weight.grad.item())
        found = (engine.sum_over_ranks(torch.tensor([rank + 1.0, 10.0 * rank])).tolist(), signals.agree(),
                 engine.gather(rank), engine.from_rank0(lambda: 7 + rank), gradients,
                 model is not net and model.num_classes, model.null is net.null)
        os._exit(int(found != ([3.0, 10.0], [signal.SIGTERM, 0], [0, 1], 7, [1.0, 2.0 * rank], 3, True)))
    processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert engine.sum_over_ranks(torch.ones(2)).tolist() == [1, 1] and engine.gather(5) == [5]


@pytest.mark.parametrize("rank, batches", [(0, [0, 4, 8]), (1, [2, 6])])
def test_processes_take_turns_at_batches(monkeypatch, rank, batches):
    monkeypatch.setattr(engine, "rank_and_world", lambda: (rank, 2))
    assert [*engine.rank_batches(10, 2)] == batches


@pytest.mark.parametrize("device, compiled, exact, on", [
    ("cpu", True, False, True), ("cpu", False, True, False), ("cuda", True, False, False),
    ("cuda", False, True, True), ("mps", True, True, False)])
def test_sums_are_in_order_where_bits_shall_repeat(device, compiled, exact, on):
    try:
        engine.fix_order(torch.device(device), compiled, exact)
        assert torch.are_deterministic_algorithms_enabled() == on
    finally:
        torch.use_deterministic_algorithms(False)


def test_freed_memory_is_kept_unless_the_environment_says_otherwise(monkeypatch):
    """glibc takes both limits. What they save is luck of the heap: experiments/LOG.md has it."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library than glibc")
    mallopt, answers = ctypes.CDLL(None).mallopt, []

    class Library:
        def mallopt(self, *limit):
            answers.append(mallopt(*limit))
    monkeypatch.setattr(engine.ctypes, "CDLL", lambda name: Library())
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    engine.pick_device("cpu")
    assert answers == [1, 1]
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    engine.pick_device("cpu")
    assert answers == [1, 1]


class Waits(TorchFunctionMode):
    """Collects the calls for which the host waits on a GPU: those that read a number or send one."""
    READ = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "nonzero", "cpu",
            "tensor", "as_tensor"}

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, function, types, arguments=(), more=None):
        self.found.add(getattr(function, "__name__", ""))
        return function(*arguments, **(more or {}))


def training_step(settings, optimizer, device):
    """A function that makes one step as train.py does, and six of them made: they set up the optimiser."""
    objective, nets = Objective(**settings), [net.to(device) for net in networks(3)]
    (net, teacher, ema), config = nets, Config(optimizer=optimizer)
    optimizer = make_optimizer(config, net, torch.float32)
    losses, skipped = LossByTime(objective, device), Skipped(device)
    train_step = make_step(config, objective, net, net, teacher, optimizer, losses, skipped, device,
                           torch.float32)
    x, y = torch.randn(32, 3, 8, 8, device=device), torch.arange(32, device=device) % 3
    generator = torch.Generator(device)

    def step():
        set_lr(optimizer, config.lr)
        train_step(x, y, *draw(objective, x, 0, 0, range(2), generator))
        update_ema(ema, net, 0.99, 1)
    for _ in range(6):
        step()
    return step


@pytest.mark.parametrize("optimizer", ["adamw", "radam", "muon"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_of_training_never_waits(settings, optimizer):
    step = training_step(settings, optimizer, CPU)
    with Waits() as waits:
        step()
    assert len(waits.found) > 20 and not waits.found & Waits.READ
