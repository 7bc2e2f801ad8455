import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)        # the networks here are small: more threads only wait for one another


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
