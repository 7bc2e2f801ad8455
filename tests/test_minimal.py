"""minimal.py, the method on one page: its averages by hand, and who teaches whom."""
import copy

from runs import TIT_NANO
from torch.testing import assert_close

import minimal
from objective import Objective


def test_the_average_moves_fast_at_first():
    """After one step it has nine tenths of the new weights, whatever the decay rate later."""
    net = TIT_NANO(input_size=24, in_channels=3, num_classes=8)
    start, average = copy.deepcopy(net), minimal.train(net, Objective(), 1, 1.0, 0.99)
    for was, now, mean in zip(*(list(n.parameters()) for n in (start, net, average))):
        assert_close(mean, 0.1 * was + 0.9 * now)
    assert (net.final_layer.linear.weight - start.final_layer.linear.weight).abs().max() > 1e-3


def test_the_many_step_model_starts_and_teaches_the_few_step_one(monkeypatch, tmp_path):
    calls = []

    def train(net, objective, *how, teacher=None, **more):
        calls.append((net, objective.lam, teacher))
        return net
    monkeypatch.setattr(minimal, "train", train)
    minimal.main(out=tmp_path / "minimal.png")
    (many, lam, nobody), (start, lam_few, teacher) = calls
    assert (lam, lam_few, nobody) == (0, 1, None) and teacher is many is not start
    assert_close(start.state_dict(), many.state_dict(), rtol=0, atol=0)
