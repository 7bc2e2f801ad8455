"""Shapes, initialisation and switches of the network; its outputs are compared in test_golden.py."""
import pytest
import torch
from torch.testing import assert_close
from toys import calls_of

from checkpoint import build
from config import Config
from model import FAMILIES, MODELS, attend, position_table, rotary_table, rotate


def small(name="TiT-XXS/4", **more):
    return MODELS[name](**{**dict(input_size=8, in_channels=3, num_classes=2), **more})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_shapes_and_zero_start(family, patch):
    net = small(f"{family}-XXS/{patch}", in_channels=5, num_classes=7)
    x, t, y = torch.randn(2, 5, 8, 8), torch.tensor([0.0, 1.0]), torch.tensor([0, 7])
    out = net(x, t, y)
    assert out.shape == x.shape and net.num_classes == 7 and (out == 0).all()
    out.sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_weights(family):
    """Xavier's bound for matrices, .02 for embeddings and the time's MLP, 0 for gates, output and biases."""
    net = small(f"{family}-S/4", num_classes=50)
    zero = [block.adaLN_modulation[1] for block in net.blocks]
    zero += [net.final_layer.adaLN_modulation[1], net.final_layer.linear]
    assert all((layer.weight == 0).all() for layer in zero)
    for name, p in net.named_parameters():
        if name.endswith(".bias"):
            assert (p == 0).all(), name
    tables = [net.y_embedder.embedding_table, net.t_embedder.mlp[0], net.t_embedder.mlp[2]]
    for layer in tables:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03) and layer.weight.abs().max() > 0.05
    small_ones = {id(layer) for layer in (*zero, *tables)}
    matrices = [m for m in net.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    for layer in matrices:
        if id(layer) not in small_ones:
            rows, columns = layer.weight.flatten(1).shape
            bound = (6 / (rows + columns)) ** 0.5
            assert 0.99 * bound < layer.weight.abs().max() <= bound


@pytest.mark.parametrize("size, depth, width, heads", [
    ("XXS", 4, 128, 4), ("XS", 6, 192, 6), ("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16),
    ("XL", 28, 1152, 16)])
def test_depth_width_and_heads(size, depth, width, heads):
    with torch.device("meta"):
        for family in FAMILIES:
            for patch in (1, 2, 4, 8):
                net = MODELS[f"{family}-{size}/{patch}"](input_size=16, in_channels=4, num_classes=3)
                assert (len(net.blocks), net.pos_embed.shape[-1], net.patch_size) == (depth, width, patch)
                assert {block.attn.heads for block in net.blocks} == {heads}


def test_every_input_matters_once_trained():
    net = small("TiT-XXS/2")
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    x, t, y = torch.randn(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([0])
    out = net(x, t, y)
    for other in ((x + 0.1, t, y), (x, t + 0.1, y), (x, t, y + 2), (x.flip(-1), t, y)):
        assert (out - net(*other)).abs().max() > 1e-3


def test_x_pred_is_the_velocity_of_the_data_that_the_layers_estimate():
    plain, net = small(), small(x_pred=True)
    torch.nn.init.normal_(plain.final_layer.linear.weight)
    net.load_state_dict(plain.state_dict())
    x_t, t, y = torch.randn(3, 3, 8, 8), torch.tensor([0.01, 0.3, 0.9]), torch.tensor([0, 1, 2])
    expected = (x_t - plain(x_t, t, y)) / torch.tensor([0.05, 0.3, 0.9]).view(-1, 1, 1, 1)
    assert_close(net(x_t, t, y), expected)


@pytest.mark.parametrize("name, millions", [("DiT-S/2", 33), ("DiT-B/4", 130), ("DiT-L/2", 458),
                                            ("DiT-XL/2", 675), ("SiT-XL/2", 675)])
def test_published_sizes(name, millions):
    with torch.device("meta"):
        net = MODELS[name](input_size=32, in_channels=4, num_classes=1000)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) in (millions, millions + 1)


def test_the_size_of_the_published_files():
    with torch.device("meta"):
        net = MODELS["TiT-XL/1"](input_size=16, in_channels=32, num_classes=1000)
    assert sum(p.numel() for p in net.parameters()) == 675_191_072
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 674_896_160


def test_patch_must_divide_the_image():
    with pytest.raises(ValueError, match="28 is not divisible .* 8; .*: 1, 2, 4"):
        small("TiT-XXS/8", input_size=28)


def test_rotary_scores_depend_on_relative_position_only():
    cos, sin = rotary_table(6, 16)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 36, 1, 16)
    q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
    score = (q @ k.mT)[0, 0].view(6, 6, 6, 6)
    assert_close(score[:5, :5, :5, :5], score[1:, 1:, 1:, 1:])
    assert (score[0, 0] - score[0, 0, 0, 0]).abs().max() > 1e-3


def test_position_table_has_the_column_first():
    table = position_table(4, 32)[0].view(4, 4, 32)
    assert_close(table[0, :, :16], table[3, :, :16])
    assert_close(table[:, 0, 16:], table[:, 3, 16:])
    assert_close(table[0, 1, 0], torch.tensor(1.0).sin())


def test_plain_attention_is_the_fused_one():
    q, k, v = torch.randn(3, 2, 3, 16, 8)
    exact = attend(q.double(), k.double(), v.double()).float()
    assert_close(attend(q, k, v), exact, rtol=1e-4, atol=1e-5)
    assert_close(attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float(), exact, rtol=0.05, atol=0.03)


def test_recomputing_activations_changes_nothing():
    """But that each block then runs twice a step."""
    x, t, y, grads = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.9]), torch.tensor([0, 1]), []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = build(Config(model="TiT-XXS/4", grad_checkpoint=recompute), (3, 8, 8), 2)
        torch.nn.init.normal_(net.final_layer.linear.weight)
        calls = calls_of(net.blocks[0])
        net(x, t, y).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad]))
        assert len(calls) == 1 + recompute
    assert_close(*grads, rtol=0, atol=0)


def test_time_is_embedded_in_float32_under_autocast():
    net, t = small(), torch.tensor([0.5, 0.501])
    with torch.autocast("cpu", torch.bfloat16):
        low = net.t_embedder(t)
    assert low.dtype == torch.float32
    assert_close(low, net.t_embedder(t), rtol=0, atol=0)


def test_a_network_of_ones_own_must_have_what_is_asked(monkeypatch):
    monkeypatch.setitem(MODELS, "bare", lambda **shape: torch.nn.Identity())
    for setting in ("x_pred", "grad_checkpoint"):
        with pytest.raises(ValueError, match=setting):
            build(Config(model="bare", **{setting: True}), (3, 8, 8), 4)
