"""The arithmetic behind the speed table: flops against torch's own counter, and a row of the table."""
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
from model import MODELS
from report import flops_per_image


@pytest.mark.parametrize("name", ["TiT-XXS/4", "SiT-XXS/4", "LightningDiT-XXS/2", "DiT-XXS/4"])
def test_flops_are_those_that_torch_counts(name):
    net = MODELS[name](input_size=16, in_channels=4, num_classes=7)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):     # not every torch counts its fused attention
        net(torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([0, 7]))
    assert flops_per_image(net) == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)


def test_xl_costs_what_the_paper_s_hardware_pays():
    """TiT-XL/1 on 16x16x32: about 237 GFLOP a picture forward."""
    with torch.device("meta"):
        net = MODELS["TiT-XL/1"](input_size=16, in_channels=32, num_classes=1000)
    assert flops_per_image(net) == pytest.approx(237e9, rel=0.03)


def test_a_table_on_this_machine(capsys):
    bench.main(bench.Options(model="TiT-XXS/8", compiles="no", dtypes="float32", batches="16", seconds=0.01, device="cpu"))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "float32" in line]
    assert len(rows) == len(bench.TRAIN) + len(bench.TUNE) + len(bench.SAMPLE)
    assert all(0 < float(row.split("|")[8].strip().rstrip("%")) < 130 for row in rows)
    with pytest.raises(ValueError, match="unknown model"):
        bench.main(bench.Options(model="nothing", device="cpu"))
