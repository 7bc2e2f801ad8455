"""Blocks compiled one by one, as on a GPU: what they compute, and which tensors they write to memory."""
import collections
import copy
import re

import pytest
import torch
from runs import TIT_NANO
from toys import on_gpu
from torch._inductor.utils import run_and_get_code
from torch.testing import assert_close

from engine import wrap
from model import FAMILIES, Block, rotary_table
from objective import Objective

both = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow),
                                          pytest.param("cuda", marks=on_gpu)])


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    yield
    torch.use_deterministic_algorithms(False)


@both
def test_compiled_blocks_train_as_plain_ones(device):
    """The same loss and gradient, also with recomputed activations and with derivatives in forward mode; the
    weights keep their names, and a copy is not compiled."""
    net = TIT_NANO(input_size=8, in_channels=3, num_classes=3).to(device)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, z, y = *torch.randn(2, 32, 3, 8, 8, device=device), torch.arange(32, device=device) % 3
    t, drop = torch.linspace(0.1, 0.9, 32, device=device), y == 0
    for derivative, net.grad_checkpoint in (("central", False), ("central", True), ("jvp", False)):
        found = []
        for compiled in (False, True):
            ours, teacher = (copy.deepcopy(net).requires_grad_(on) for on in (True, False))
            for network in (ours, teacher):
                wrap(network, torch.device("cuda"), compiled)
            assert ours.state_dict().keys() == net.state_dict().keys()
            objective = Objective(lam=1.0, zeta=1.0, style="fc-vs-fe", derivative=derivative, dt=0.05)
            loss = objective(ours, x, y, t, z, drop, teacher).mean()
            loss.backward()
            found.append([loss, *(p.grad for p in ours.parameters())])
        assert ours.blocks[0]._compiled_call_impl and not copy.deepcopy(ours).blocks[0]._compiled_call_impl
        assert_close(*found, rtol=1e-3, atol=1e-5)


@both
def test_what_a_block_writes_to_memory(device, capsys):
    """In bfloat16 float32 is left to the stream that the blocks add to, its gradient, and on a GPU the
    gradients of q and k. Counted in the compiled code: tensors that grow with images and tokens, but for one
    number a token."""
    images, tokens, width, heads = 13, 25, 192, 6
    block = Block(width, heads, **{k: FAMILIES["TiT"][k] for k in ("norm", "mlp", "qk_norm")}).to(device)
    rope = [table.to(device) for table in rotary_table(5, width // heads)]
    x, c = (torch.randn(shape, device=device, requires_grad=True)
            for shape in ((images, tokens, width), (images, width)))

    def passes():
        with torch.autocast(device, torch.bfloat16):
            out = torch.compile(block)(x, c, rope)
        out.sum().backward()
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(passes)
    rows = {}
    for what, code in zip(("forward", "backward"), codes, strict=True):
        rows[what] = collections.Counter()
        for shape, dtype in re.findall(r"= empty_strided\w*\(\(([^)]*)\), \([^)]*\), torch\.(\w+)", code):
            size = torch.Size(map(int, re.findall(r"\d+", shape))).numel()
            if size % (images * tokens) == 0 and size >= images * tokens * width // 2:
                rows[what][dtype] += 1
    with capsys.disabled():
        print(f"\n| {device} | bfloat16 | float32 |\n|---|---|---|")
        for what, row in rows.items():
            print(f"| {what} | {row['bfloat16']} | {row['float32']} |")
    assert 0 < rows["forward"]["float32"] <= 1 and 0 < rows["backward"]["float32"] <= 4
