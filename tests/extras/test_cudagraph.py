"""A step recorded once and replayed as a CUDA graph.

A CPU has no graphs. A tape takes the place of one, under the same rules: it keeps every operation with
its memory and its numbers as they were, a replay runs them again in that memory, and reading a number is an
error.
"""
import contextlib
import copy
from functools import partial

import pytest
import torch
from test_launches import CPU, FEW, SETTINGS, batches, networks
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
from config import Config
from experiments.bench import make_step
from extras.cudagraph import Graphed
from log import LossByTime
from objective import Objective
from optim import Skipped, can_capture, learning_rate, make_optimizer, optimizer_step, set_lr
from sampler import sample

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


@pytest.mark.parametrize("settings, name, moves", [
    *((s, "muon", False) for s in SETTINGS), (FEW, "muon", True),
    (FEW, "radam", False), ({}, "adamw", False)])
def test_a_replayed_step_is_the_step(tape, settings, name, moves):
    """The same norms, losses and weights, bit for bit, while data, noise, times, weights, the rate and lam
    change, and where a step is left out. RAdam's early steps look at a number, and are not recorded."""
    objective, (net, teacher) = Objective(**settings), networks(2)
    lam = torch.zeros(()) if moves else None
    config, ends = Config(optimizer=name, lr=0.01, steps=12, warmup=9), []
    steps = list(batches(objective, config.steps))
    steps[-2][0][3] = torch.nan
    for graph in (False, True):
        ours = copy.deepcopy(net)
        optimizer, norms = make_optimizer(config, ours, torch.float32), []
        losses, skipped = LossByTime(objective, "cpu"), Skipped("cpu")
        optimizer.param_groups[0]["lr"] = torch.tensor(config.lr)           # as it is on a GPU
        train_step = make_step(config, objective, ours, ours, teacher, optimizer, losses, skipped, CPU,
                               torch.bfloat16, lam)
        if graph:
            train_step = Graphed(train_step, partial(can_capture, optimizer))
        for step, batch in enumerate(steps):
            set_lr(optimizer, learning_rate(config, step))
            if moves:
                lam.fill_(step / 11)
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


def test_what_looks_at_a_number_cannot_be_recorded(tape):
    step = Graphed(lambda x: x if x.sum() > 0 else -x)
    with pytest.raises(RuntimeError, match="while a graph is recorded") as found:
        for _ in range(4):
            step(torch.ones(3))
    assert "--no-compile" in found.value.__notes__[0]
