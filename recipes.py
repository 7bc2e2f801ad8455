"""The recipes: one table of the settings that differ from the defaults in config.py.

    python train.py --recipe NAME [--FLAG VALUE ...]        # flags win over the recipe

FD-NAME s @ n in a row is its score at n network calls, by our own features (RESULTS.md); lower is better.
Minutes are for two CPU cores with fast bfloat16, unless they say one core.
"""
X_PRED = dict(x_pred=True, gap=(0.001, 0.05))           # such a network divides by max(t, .05)
SHAPES, SHAPES32 = dict(model="TiT-XXS/8", **X_PRED), dict(model="TiT-XS/8", **X_PRED)
MNIST = dict(data="mnist", model="TiT-XXS/4", **X_PRED)
FASHION = MNIST | dict(data="fashion", model="TiT-XS/4")
AVATARS = dict(data="npz:avatars64.npz", model="TiT-XS/8", **X_PRED)
CIFAR = dict(data="cifar10", model="TiT-S/2", batch_size=128)
FOLDER = dict(data="folder:images", model="TiT-XS/4", **X_PRED)
MANY = dict(zeta=0.5, style="ft-vs-fe", time_beta=(2.0, 1.0, 1.0), time_weight="none", lr=8e-3)
FEW = dict(lam=1.0, zeta=1.0, style="fc-vs-xz", enhance_range=(0.0, 1.0), huber=1.0, time_weight="none",
           time_beta=(0.8, 1.0, 1.0), derivative="backward", dt=0.05, optimizer="radam", betas=(0.9, 0.999),
           warmup=20, ema=(0.99,), sample_steps=2, kappa=0.0, gap=(0.001, 0.7))
FEW32 = FEW | dict(derivative="central", dt=0.02, lr=1e-3, gap=(0.001, 0.6))
MUON = dict(optimizer="muon")
# One call learns what the few-step model draws with two, at t and at 3/4 t.
ONE = FEW | MUON | dict(lam=0.75, distil=True, time_beta=(3.0, 1.0, 1.0), lr=3e-3, warmup=100, ema=(0.995,),
                        sample_steps=1)


def recipe(about, *parts, **more):
    """One row; later parts win. about: what it trains, for -h."""
    row = {"about": about}
    for part in (*parts, more):
        row |= part
    return row


RECIPES = {
    "shapes":       recipe("many-step: 5 to 11 min, FD-shapes 3.2 @ 20",
                           SHAPES, MANY, MUON, zeta=0.4, lr=5e-3, kappa=0.7, steps=5000),
    "shapes-few":   recipe("two steps: 35 to 90 s, 5.9 @ 2",
                           SHAPES, FEW, steps=600, rho=1.0, gap=(0.001, 0.5)),
    "shapes32":     recipe("many-step: 46 min on one core, 1.6 @ 40",
                           SHAPES32, MANY, MUON, zeta=0.3, lr=5e-3, steps=15000),
    "shapes32-few": recipe("two steps: 2 min, 1.7 @ 2", SHAPES32, FEW32, steps=440),
    "shapes32-one": recipe("one step: 7 min, 2.8 @ 1",
                           SHAPES32, FEW32, MUON, steps=1500, ema=(0.995,), sample_steps=1),
    "mnist":        recipe("many-step: 43 min on one core; on 10,000 digits FD-mnist 3.6 @ 40",
                           MNIST, MANY, MUON, zeta=0.4, steps=9000),
    "mnist-few":    recipe("two steps: 2 min; on 10,000 digits 3.6 @ 2",
                           MNIST, FEW, MUON, lr=6e-3, warmup=100, steps=360, gap=(0.001, 0.85)),
    "fashion":      recipe("many-step: 60 to 90 min on one core, FD-fashion 4.1 @ 40",
                           FASHION, MANY, MUON, zeta=0.4, steps=9000),
    "fashion-few":  recipe("two steps: 6 min on one core, 4.2 @ 2", FASHION, FEW, MUON,
                           lr=3e-3, warmup=100, steps=720, ema=(0.995,), dt=0.1, rho=0.5, gap=(0.001, 0.75)),
    "fashion-one":  recipe("one step: 13 to 16 min on one busy core, 4.0 @ 1", FASHION, ONE, steps=720),
    "avatars":      recipe("many-step: 70 to 120 min on one core",
                           AVATARS, MANY, MUON, zeta=0.4, lr=5e-3, steps=6000),
    "avatars-few":  recipe("two steps: 20 min on one core", AVATARS, FEW, MUON, lr=3e-3, warmup=100,
                           steps=1000, ema=(0.995,), dt=0.1, gap=(0.001, 0.75)),
    "avatars-one":  recipe("one step: 42 min on one busy core", AVATARS, ONE, steps=1000),
    "folder":       recipe("many-step, your images: 80 min", FOLDER, MANY, MUON, lr=5e-3, steps=5000),
    "folder-few":   recipe("two steps: 10 min", FOLDER, FEW, steps=600),
    "cifar10":      recipe("many-step; not run", CIFAR, MANY, lr=1e-3, steps=200_000, ema=(0.9999,)),
    "cifar10-few":  recipe("two steps; not run", CIFAR, FEW, lr=1e-4, steps=10_000),
}

# The published recipes (arXiv 2505.07447): ImageNet, 675 M parameters; published FID @ NFE. Not run here.
# They need GPU-days and downloads. Give --data latents:DIR, and to fine-tune also --init_from.
LATENTS = dict(image_size=256, ema=(0.9999,), warmdown=0.0, warmup=0, batch_size=1024, grad_clip=0.1)
WARP = (1.17, 0.8, 1.1)
IN_MANY = LATENTS | dict(style="ft-vs-fe", cosine_loss=True, lr=2e-4, betas=(0.9, 0.95), grad_clip=1.0,
                         schedule=WARP, sample_steps=40)
IN_FEW = LATENTS | dict(lam=1.0, style="fc-vs-xz", huber=5.0, time_beta=(0.8, 1.0, 1.0), optimizer="radam",
                        lr=1e-4, betas=(0.9, 0.999), steps=50_000, sample_steps=2, kappa=0.0, rho=1.0)
IN_TUNE = IN_FEW | dict(style="fc-vs-fe", ema=(0.99,), steps=800)
FASTER = LATENTS | dict(schedule=WARP, sample_steps=50)
VAVAE, SD = dict(model="TiT-XL/1", vae="vavae"), dict(model="TiT-XL/2", vae="sd-ema")
E2E, DCAE = dict(model="TiT-XL/1", vae="e2e-vavae"), dict(model="TiT-XL/1", vae="dc-ae", image_size=512)
SD512 = dict(model="TiT-XL/4", vae="sd-ema", image_size=512)
REPAE, REPA = dict(model="SiT-XL/1", vae="e2e-vavae"), dict(model="SiT-XL/2", vae="sd-ema")
LIGHTNING = dict(model="LightningDiT-XL/1", vae="vavae", transport="relinear")
DDT = dict(model="DDT-XL/2", vae="sd-ema", transport="relinear")
DIT = dict(model="DiT-XL/2", vae="sd-ema", transport="ddpm")
MIDDLE = dict(time_beta=(2.4, 2.4, 1.0))

RECIPES |= {
    # train, many-step
    "in256-vavae": recipe("published FID 1.21 @ 30", IN_MANY, VAVAE, zeta=0.47, steps=500_000,
                          sample_steps=30, kappa=0.5, schedule=(1.0, 1.0, 1.0)),
    "in256-e2e":   recipe("published many-step", IN_MANY, E2E, zeta=0.67, steps=300_000, kappa=0.5),
    "in256-sd":    recipe("published many-step", IN_MANY, SD, MIDDLE, zeta=0.44, steps=500_000,
                          sample_steps=60, kappa=0.21),
    "in512-dcae":  recipe("published FID 1.48 @ 40", IN_MANY, DCAE, zeta=0.57, steps=1_000_000, kappa=0.46),
    "in512-sd":    recipe("published many-step", IN_MANY, SD512, MIDDLE, zeta=0.60, steps=400_000, kappa=0.4),
    # train, few-step
    "in256-vavae-few": recipe("published FID 1.42 @ 2", IN_FEW, VAVAE, zeta=2.0, steps=40_000,
                              gap=(0.001, 0.3)),
    "in256-e2e-few":   recipe("published few-step", IN_FEW, E2E, zeta=1.3, huber=9.0, gap=(0.001, 0.5)),
    "in256-sd-few":    recipe("published few-step", IN_FEW, SD, zeta=2.0, gap=(0.001, 0.3)),
    "in512-dcae-few":  recipe("published FID 1.75 @ 2", IN_FEW, DCAE, zeta=1.5, gap=(0.0, 0.6)),
    "in512-sd-few":    recipe("published few-step", IN_FEW, SD512, zeta=1.5, gap=(0.001, 0.5)),
    # fine-tune a published model to two steps: give --init_from
    "tune-repae":        recipe("published FID 1.39 @ 2", IN_TUNE, REPAE, zeta=2.5, steps=500,
                                gap=(0.001, 0.75)),
    "tune-repa":         recipe("published FID 1.95 @ 2", IN_TUNE, REPA, zeta=1.7, gap=(0.001, 0.6)),
    "tune-lightningdit": recipe("published FID 2.06 @ 2", IN_TUNE, LIGHTNING, zeta=3.0, gap=(0.001, 0.6)),
    "tune-ddt":          recipe("published FID 1.90 @ 2", IN_TUNE, DDT, zeta=1.9, batch_size=512,
                                gap=(0.001, 0.5)),
    # not published, not run. A SiT's learned sigma is dropped; a DiT's is kept, but not trained
    "tune-sit":          recipe("fine-tunes SiT files; not run", IN_TUNE, REPA, transport="relinear",
                                zeta=1.7, gap=(0.001, 0.6)),
    "tune-dit":          recipe("fine-tunes DiT files; not run", IN_TUNE, DIT, zeta=1.7, gap=(0.001, 0.6)),
    # sample a published model faster: give --ckpt. dit and sit have no published settings
    "repae":        recipe("published FID 1.06 @ 80", FASTER, REPAE, cfg_scale=2.5, cfg_interval=(0.0, 0.76),
                           sample_steps=40, kappa=0.54, schedule=(1.2, 0.72, 1.2), gap=(0.001, 0.002)),
    "lightningdit": recipe("published FID 1.21 @ 100", FASTER, LIGHTNING, cfg_scale=6.7,
                           cfg_interval=(0.125, 1.0), kappa=0.5),
    "ddt":          recipe("published FID 1.27 @ 100", FASTER, DDT, cfg_scale=2.0, cfg_interval=(0.3, 1.0),
                           kappa=0.28),
    # ddt512 was published after the paper, whose own settings have FID 1.24 @ 300:
    # --cfg_scale 3 --cfg_interval .3,1 --kappa .28 --schedule 1.17,.8,1.1
    "ddt512":       recipe("published FID 1.18 @ 300", FASTER, DDT, image_size=512, cfg_scale=2.35,
                           kappa=0.48, cfg_interval=(0.24, 1.0), sample_steps=150, schedule=(1.14, 0.8, 1.1)),
    "sit":          recipe("samples SiT files", FASTER, REPA, transport="relinear", cfg_scale=1.5),
    "dit":          recipe("samples DiT files", LATENTS, DIT, sample_steps=50, cfg_scale=1.5),
}

# A run starts from the many-step run of the same name; one that distils starts from the few-step run.
for name, row in RECIPES.items():
    base, _, steps = name.rpartition("-")
    if steps in ("few", "one"):
        row["init_from"] = f"runs/{base}-few" if row.get("distil") else f"runs/{base}"
