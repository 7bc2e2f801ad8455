"""torch.hub on a local folder."""
import torch
from torch.testing import assert_close
from toys import ROOT

from sample import SHIPPED, generate, open_pipeline


def test_torch_hub_draws_what_sample_py_draws():
    settings = dict(seeds=[3, 5], device="cpu", steps=1)
    images, classes = torch.hub.load(str(ROOT), "generate", source="local", **settings)
    pipeline = open_pipeline(SHIPPED, torch.device("cpu"))
    _, expected, y = next(generate(pipeline, [3, 5], 2, steps=1))
    assert classes.tolist() == y.tolist() == [3, 5] and images.shape[0] == 2
    assert_close(images, expected, rtol=0, atol=0)
