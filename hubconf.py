"""For torch.hub: images from the shipped model, and the sampler as a scheduler of diffusers.

    images, classes = torch.hub.load("USER/nanoucgm", "generate", seeds=range(16), steps=2)
    UCGMScheduler = torch.hub.load("USER/nanoucgm", "scheduler")        # needs diffusers
"""
dependencies = ["torch", "numpy", "PIL", "tqdm", "einops", "safetensors", "filelock"]


def generate(seeds=range(16), ckpt="", device="auto", **settings):
    """Images (B, C, S, S) float32 in [-1, 1] on the CPU, and their classes (B,).

    seeds: one per image, whose class is the seed modulo the number of classes. ckpt: as for sample.py; empty:
    the shipped model. settings: those of sampler.sample, such as steps=2.
    """
    from engine import pick_device
    from sample import SHIPPED, open_pipeline
    from sample import generate as batches
    pipeline = open_pipeline(ckpt or SHIPPED, pick_device(device))
    _, images, classes = next(batches(pipeline, list(seeds), len(seeds), **settings))
    return images, classes


def scheduler():
    """The class UCGMScheduler: pipe.scheduler = UCGMScheduler.from_config(pipe.scheduler.config)."""
    from extras.scheduler import UCGMScheduler
    return UCGMScheduler
