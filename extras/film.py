"""An animation of the sampler: the noise, then the data that a model predicts after each of its calls.

    python sample.py --ckpt runs/shapes --beside runs/shapes-few --out film.gif
"""
from PIL import Image

from data import image_grid, noise_like_seed
from sample import generate


def draw_film(pipelines, seeds, options, classes, columns):
    """Write options.out, a gif with one page per call, for several models side by side."""
    films = []
    for pipeline in pipelines:
        frames = [noise_like_seed(seeds, pipeline.shape).to(pipeline.device)]
        see = lambda i, t, x_hat, frames=frames: frames.append(x_hat)
        next(generate(pipeline, seeds, len(seeds), classes=classes, on_step=see, **options.given()))
        titles = [f"{k} of {len(frames) - 1}" for k in range(len(frames))]
        films.append([image_grid(pipeline.to_images(x), columns, titles=["call", title])
                      for x, title in zip(frames, titles)])
    width, height = films[0][0].size
    pages = [Image.new("RGB", ((width + 24) * len(films) - 24, height), "white") for _ in max(films, key=len)]
    for k, film in enumerate(films):
        for i, page in enumerate(pages):
            page.paste(film[min(i, len(film) - 1)], (k * (width + 24), 0))
    pages = [page.quantize(128, dither=Image.Dither.NONE) for page in pages]     # for a smaller file
    pages[0].save(options.out, save_all=True, append_images=pages[1:], loop=0,
                  duration=[800, *[100] * (len(pages) - 2), 3000])
