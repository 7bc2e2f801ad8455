import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model  # noqa: E402
from runs import TIT_NANO  # noqa: E402

FAST = "not slow and not cuda"             # as in pyproject.toml
torch.set_num_threads(1)        # the networks here are small: more threads only wait for one another


def pytest_xdist_auto_num_workers(config):
    """A process per core for the whole suite. Files named on the command line run in this process, and so do
    the slow tests and those on a GPU, which measure times or start processes of their own."""
    if config.args_source == config.ArgsSource.TESTPATHS and config.option.markexpr == FAST:
        return min(8, os.cpu_count())
    config.option.dist = "no"
    return 0


def pytest_collection_modifyitems(items):
    """The longest test goes first: last, it would keep one process busy while the others wait."""
    items.sort(key=lambda item: "test_promise" not in item.nodeid)


def pytest_terminal_summary(terminalreporter):
    """What was skipped, and what would run it."""
    reasons = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])]
    if lacking := sum("could not import" in reason for reason in reasons):
        terminalreporter.write_line(f"{lacking} tests skipped: pip install -r requirements-dev.txt runs them")
    for reason in sorted({reason for reason in reasons if "could not import" not in reason}):
        terminalreporter.write_line(reason.replace("Skipped: ", "skipped: "))


@pytest.fixture(autouse=True)
def seed_and_device(request, monkeypatch):
    """The same start for each test, and the CPU, also on a machine with a GPU, but for those marked cuda."""
    torch.manual_seed(0)
    if not request.node.get_closest_marker("cuda"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")          # for the processes that it starts
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file of random Inception weights whose features vary: He scaling, and batch norms as they come."""
    import torchvision
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                          init_weights=False)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty current folder, and the network of tests/old_run under the name TiT-nano/4."""
    monkeypatch.setitem(model.MODELS, "TiT-nano/4", TIT_NANO)
    monkeypatch.chdir(tmp_path)
    return tmp_path
