"""The table of recipes: each row is what was measured or published, and a resumed run keeps its settings."""
import dataclasses
import json

import pytest
from toys import GOLDEN

import extras.published as published
import model
from config import Config, differences, read_config
from recipes import RECIPES
from sampler import time_grid


def test_no_row_changes_by_accident():
    """All settings of all recipes, as in tests/golden/recipes.json. To change one on purpose, write the file
    anew: PYTHONPATH=. python tests/test_recipes.py."""
    assert settings() == json.loads((GOLDEN / "recipes.json").read_text())


def settings():
    """{recipe: its settings that are not the defaults of today, as JSON has them}."""
    usual = dataclasses.asdict(Config())
    found = {name: {key: value for key, value in dataclasses.asdict(Config(**row)).items()
                    if value != usual[key] and key != "about"} for name, row in RECIPES.items()}
    return json.loads(json.dumps(found | {"defaults": usual}))


def test_defaults_then_recipe_then_flags():
    assert read_config([], "").out == "runs/shapes"
    flags = "--recipe shapes-few --lr=0 --time_beta .5,.6,1 --kappa 0.3 --exact --no-x_pred"
    few = read_config(flags.split(), "")
    assert few.lam == RECIPES["shapes-few"]["lam"] == 1 and few.out == "runs/shapes-few"
    assert (few.lr, few.time_beta, few.kappa, few.exact, few.x_pred) == (0, (0.5, 0.6, 1), 0.3, True, False)
    assert read_config(["--seed", f"{2**62 + 1}"], "").seed == 2**62 + 1
    assert read_config(["--kappa", "auto"], "").kappa == "auto" and read_config(["--out", "x"], "").out == "x"
    given = ([], ["--compile"], ["--no-compile"])
    assert [read_config(words, "").compile for words in given] == [None, True, False]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_a_run_whose_sampler_can_draw(name, monkeypatch):
    """Its objective, a narrow network of its family, and a grid of its steps; what is given wins."""
    config = read_config(["--recipe", name], "")
    settings = config.sampler(steps=3, kappa=0.0, gap=None)
    assert (settings["steps"], settings["kappa"], settings["gap"]) == (3, 0.0, config.gap)
    assert config.sampler()["steps"] == config.sample_steps and settings["transport"] == config.transport
    times = time_grid(config.sample_steps, config.schedule, config.gap, 1, config.kappa, config.transport)
    assert len(times) == config.sample_steps + 1 and config.batch_size % 16 == 0
    config.objective().check_networks(10, has_teacher=True)
    assert config.model in model.MODELS | published.MODELS
    few = name.endswith(("-few", "-one")) or name.startswith("tune-")
    lam = 0.75 if config.distil else 1.0 if few else 0.0
    assert config.lam == lam and (config.optimizer != "adamw" or not few)
    base = f"runs/{name.rpartition('-')[0]}" if name.endswith(("-few", "-one")) else ""
    base += "-few" * config.distil
    assert config.init_from == base


# As published: network, latents, zeta, Beta, c, cosine loss, steps; sampler: steps, kappa, rho, warp, gap.
WARP, EVEN, NARROW = (1.17, 0.8, 1.1), (1.0, 1.0, 1.0), (0.001, 0.001)
FLAT, LATE, MIDDLE = (1.0, 1.0, 1.0), (0.8, 1.0, 1.0), (2.4, 2.4, 1.0)
PUBLISHED = {
    "in256-vavae": ("TiT-XL/1", "vavae", 0.47, FLAT, 0, True, 500_000, 30, 0.5, 0, EVEN, NARROW),
    "in256-e2e": ("TiT-XL/1", "e2e-vavae", 0.67, FLAT, 0, True, 300_000, 40, 0.5, 0, WARP, NARROW),
    "in256-sd": ("TiT-XL/2", "sd-ema", 0.44, MIDDLE, 0, True, 500_000, 60, 0.21, 0, WARP, NARROW),
    "in512-dcae": ("TiT-XL/1", "dc-ae", 0.57, FLAT, 0, True, 1_000_000, 40, 0.46, 0, WARP, NARROW),
    "in512-sd": ("TiT-XL/4", "sd-ema", 0.60, MIDDLE, 0, True, 400_000, 40, 0.4, 0, WARP, NARROW),
    "in256-vavae-few": ("TiT-XL/1", "vavae", 2.0, LATE, 5, False, 40_000, 2, 0, 1, EVEN, (0.001, 0.3)),
    "in256-e2e-few": ("TiT-XL/1", "e2e-vavae", 1.3, LATE, 9, False, 50_000, 2, 0, 1, EVEN, (0.001, 0.5)),
    "in256-sd-few": ("TiT-XL/2", "sd-ema", 2.0, LATE, 5, False, 50_000, 2, 0, 1, EVEN, (0.001, 0.3)),
    "in512-dcae-few": ("TiT-XL/1", "dc-ae", 1.5, LATE, 5, False, 50_000, 2, 0, 1, EVEN, (0.0, 0.6)),
    "in512-sd-few": ("TiT-XL/4", "sd-ema", 1.5, LATE, 5, False, 50_000, 2, 0, 1, EVEN, (0.001, 0.5)),
    "tune-repae": ("SiT-XL/1", "e2e-vavae", 2.5, LATE, 5, False, 500, 2, 0, 1, EVEN, (0.001, 0.75)),
    "tune-repa": ("SiT-XL/2", "sd-ema", 1.7, LATE, 5, False, 800, 2, 0, 1, EVEN, (0.001, 0.6)),
    "tune-lightningdit": ("LightningDiT-XL/1", "vavae", 3.0, LATE, 5, False, 800, 2, 0, 1, EVEN,
                          (0.001, 0.6)),
    "tune-ddt": ("DDT-XL/2", "sd-ema", 1.9, LATE, 5, False, 800, 2, 0, 1, EVEN, (0.001, 0.5)),
}
# Network, guidance, its interval; sampler: steps, kappa, warp, gap. ddt512 is the later setting.
FASTER = {
    "repae": ("SiT-XL/1", 2.5, (0.0, 0.76), 40, 0.54, (1.2, 0.72, 1.2), (0.001, 0.002)),
    "lightningdit": ("LightningDiT-XL/1", 6.7, (0.125, 1.0), 50, 0.5, WARP, NARROW),
    "ddt": ("DDT-XL/2", 2.0, (0.3, 1.0), 50, 0.28, WARP, NARROW),
    "ddt512": ("DDT-XL/2", 2.35, (0.24, 1.0), 150, 0.48, (1.14, 0.8, 1.1), NARROW),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_row(name):
    c = Config(**RECIPES[name])
    assert PUBLISHED[name] == (c.model, c.vae, c.zeta, c.time_beta, c.huber, c.cosine_loss, c.steps,
                               c.sample_steps, c.kappa, c.rho, c.schedule, c.gap)
    many, tune = c.lam == 0, name.startswith("tune-")
    style = "ft-vs-fe" if many else "fc-vs-fe" if tune else "fc-vs-xz"
    reverse = name in ("tune-lightningdit", "tune-ddt")
    size = 512 if "512" in name else 256
    assert (c.lam, c.style, c.transport, c.image_size) == (0 if many else 1, style,
                                                           "relinear" if reverse else "linear", size)
    assert (c.time_weight, c.enhance_range, c.label_drop) == ("cosine", (0.0, 0.75), 0.1)
    assert (c.optimizer, c.lr, c.betas) == (("adamw", 2e-4, (0.9, 0.95)) if many else
                                            ("radam", 1e-4, (0.9, 0.999)))
    assert (c.ema, c.grad_clip) == ((0.99 if tune else 0.9999,), 1.0 if many else 0.1)
    assert (c.batch_size, c.warmup, c.warmdown) == (512 if name == "tune-ddt" else 1024, 0, 0.0)


@pytest.mark.parametrize("name", FASTER)
def test_a_published_row_of_the_sampler(name):
    c = Config(**RECIPES[name])
    assert FASTER[name] == (c.model, c.cfg_scale, c.cfg_interval, c.sample_steps, c.kappa, c.schedule, c.gap)
    assert (c.transport, c.rho) == ("linear" if name == "repae" else "relinear", 0.0)
    assert c.vae == {"repae": "e2e-vavae", "lightningdit": "vavae"}.get(name, "sd-ema")


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Config)])
def test_a_resumed_run_keeps_every_setting_that_decides_its_result(name):
    """Free are only where and how fast it runs, how long, and what it reports."""
    free = ("out steps device compile exact threads micro_batch fsdp grad_checkpoint fresh allow_change "
            "log_every save_every report_to about").split()
    before, after = Config(fingerprint="20 images"), Config(fingerprint="20 images")
    value = getattr(after, name)
    setattr(after, name, not value if isinstance(value, bool) else "other" if isinstance(value, str) else
            (*value, 0.5) if isinstance(value, tuple) else True if value is None else value + 1)
    changed = differences(before, after)
    assert changed == ([] if name in free else [f"{name}: {value} -> {getattr(after, name)}"])


if __name__ == "__main__":
    (GOLDEN / "recipes.json").write_text(json.dumps(settings(), indent=1) + "\n")
