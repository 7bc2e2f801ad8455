"""How a step is launched: in memory that is kept, without waiting for the device, and recorded once to be
replayed as a CUDA graph.

A CPU has no graphs. A tape stands in for one, with the same rules: it keeps every operation with its memory
and its numbers as they were, a replay runs them again in that memory, and to look at a number is an error.
"""
import contextlib
import copy
import ctypes
import os
import platform
from functools import partial

import pytest
import torch
from runs import TIT_NANO
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
from config import Config
from experiments.bench import make_step
from extras.cudagraph import Graphed
from log import LossByTime
from objective import TRANSPORTS, Objective
from sampler import sample
from train import draw
from optim import Skipped, can_capture, learning_rate, make_optimizer, optimizer_step, set_lr, update_ema

CPU = torch.device("cpu")
LOOKS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.rows, self.before = [], {}

    def __torch_dispatch__(self, operation, types, arguments=(), more=None):
        if operation._schema.name in LOOKS:
            raise RuntimeError(f"{operation} while a graph is recorded")
        for value in tree_leaves((arguments, more)):
            if isinstance(value, torch.Tensor) and value.is_cpu and not value._is_zerotensor():
                memory = value.untyped_storage()
                if memory.data_ptr() not in self.before:
                    self.before[memory.data_ptr()] = memory, memory.clone()
        made = operation(*arguments, **(more or {}))
        self.rows.append((operation, arguments, more or {}, made))
        return made

    def undo(self):
        """A GPU only writes down what it is to do."""
        for memory, old in self.before.values():
            memory.copy_(old)

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)       # its casts are on the tape
    def replay(self):
        for operation, arguments, more, made in self.rows:
            again = operation(*arguments, **more)
            for old, new in zip(tree_leaves(made), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


@pytest.fixture
def tape(monkeypatch):
    """torch.cuda with tapes for graphs; the list of those that were recorded."""
    tapes = []

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def record(tape, stream, capture_error_mode):
        tapes.append(tape)
        with tape:
            yield
        tape.undo()
    fakes = dict(CUDAGraph=Tape, graph=record, Stream=Stream, current_stream=Stream,
                 stream=lambda stream: contextlib.nullcontext())
    for name, fake in fakes.items():
        monkeypatch.setattr(engine.torch.cuda, name, fake)
    return tapes


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


@pytest.mark.parametrize("settings, name", [*((s, "muon") for s in SETTINGS), (FEW, "radam"), ({}, "adamw")])
def test_a_replayed_step_is_the_step(tape, settings, name):
    """The same norms, losses and weights, bit for bit, while data, noise, times, weights and the rate change,
    and where a step is left out. RAdam's early steps look at a number, and are not recorded."""
    objective, (net, teacher) = Objective(**settings), networks(2)
    config, ends = Config(optimizer=name, lr=0.01, steps=12, warmup=9), []
    steps = list(batches(objective, config.steps))
    steps[-2][0][3] = torch.nan
    for graph in (False, True):
        ours = copy.deepcopy(net)
        optimizer, norms = make_optimizer(config, ours, torch.float32), []
        losses, skipped = LossByTime(objective, "cpu"), Skipped("cpu")
        optimizer.param_groups[0]["lr"] = torch.tensor(config.lr)           # as it is on a GPU
        train_step = make_step(config, objective, ours, ours, teacher, optimizer, losses, skipped, CPU,
                               torch.bfloat16)
        if graph:
            train_step = Graphed(train_step, partial(can_capture, optimizer))
        for step, batch in enumerate(steps):
            set_lr(optimizer, learning_rate(config, step))
            norms.append(train_step(*batch))
            if step % 4 == 3:
                norms += [losses.take()["loss"], skipped.report(step, None, str)]
        ends.append([*norms, *ours.parameters()])
    assert len(tape) == 1 and len(tape[0].rows) > 100
    assert ends[0][0] != ends[0][1] and ends[0][-1].isfinite().all() and ends[0][17] == 1
    assert_close(*ends, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, lr=0.0),
                                  partial(torch.optim.NAdam, lr=torch.tensor(0.0), foreach=False)])
def test_an_optimiser_that_no_graph_can_hold_is_never_recorded(tape, make):
    """A graph would keep SGD's rate, which is no tensor; NAdam is not fused, so a number is looked at."""
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer, seen = make([weight]), []

    def move():
        weight.grad = torch.ones(())
        optimizer_step(optimizer, weight.grad.isfinite())
        return weight.detach().clone()
    step = Graphed(move, lambda: can_capture(optimizer))
    for rate in (1, 0, 1, 0, 1, 0, 1):
        set_lr(optimizer, rate)
        seen.append(step().item())
    assert [a != b for a, b in zip(seen, seen[1:])] == [False, True] * 3 and not tape


def test_a_replayed_network_draws_the_same_images_and_other_shapes_go_past_it(tape):
    """One recording serves every step of every batch but the last, which is smaller."""
    net, = networks(1)
    recorded = Graphed(net)
    recorded.num_classes = net.num_classes
    for images in (6, 6, 4):
        z, y = torch.randn(images, 3, 8, 8), torch.arange(images) % 3
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = (sample(f, z, y, steps=5, kappa="auto") for f in (recorded, net))
        assert_close(found, expected, rtol=0, atol=0)
    assert len(tape) == 1


def test_the_shape_that_comes_often_is_the_one_recorded(tape):
    double = Graphed(lambda x: 2 * x)
    for size in (8, 8, 8, 3, 8, 8, 8, 8, 3, 8):
        assert_close(double(torch.full((size,), size)), torch.full((size,), 2 * size))
    assert len(tape) == 1 and double.inputs[0].shape == (8,)


def test_exact_sums_want_cublas_as_it_is_set(monkeypatch):
    """Checked before anything is trained: torch itself would end at the first product, or not at all."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    with pytest.raises(ValueError, match="unset it"):
        engine.fix_order(torch.device("cuda"), True, True)


def test_what_looks_at_a_number_cannot_be_recorded(tape):
    step = Graphed(lambda x: x if x.sum() > 0 else -x)
    with pytest.raises(RuntimeError, match="while a graph is recorded") as found:
        for _ in range(4):
            step(torch.ones(3))
    assert "--no-compile" in found.value.__notes__[0]


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
