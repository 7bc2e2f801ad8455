"""An animation of the sampler: the noise, then the data that a model predicts after each of its calls.

    python sample.py --ckpt runs/shapes --beside runs/shapes-few --out film.gif
"""
from PIL import Image, ImageDraw, ImageFont

from data import image_grid, noise_like_seed
from sample import generate

COLUMNS, GAP, TITLE = 5, 24, 20         # images per row; pixels between two models, and above each


def draw_film(pipelines, seeds, options, classes):
    """Write options.out, a gif with one page per call, for several models side by side."""
    films = []
    for pipeline in pipelines:
        frames = [noise_like_seed(seeds, pipeline.shape).to(pipeline.device)]
        see = lambda i, t, x_hat, frames=frames: frames.append(x_hat)
        next(generate(pipeline, seeds, len(seeds), classes=classes, on_step=see, **options.given()))
        films.append([(f"{pipeline.config.recipe}: call {k} of {len(frames) - 1}",
                       image_grid(pipeline.to_images(x), COLUMNS)) for k, x in enumerate(frames)])
    width, height = films[0][0][1].size
    pages = []
    for i in range(max(map(len, films))):
        page = Image.new("RGB", ((width + GAP) * len(films) - GAP, height + TITLE), "white")
        for k, film in enumerate(films):
            title, images = film[min(i, len(film) - 1)]
            ImageDraw.Draw(page).text((k * (width + GAP), 2), title, "black", ImageFont.load_default(13))
            page.paste(images, (k * (width + GAP), TITLE))
        pages.append(page)
    # One palette, of the finished images: the colours of the noise would take the place of theirs.
    palette = Image.new("P", (1, 1))
    colours = pages[-1].quantize(256, kmeans=4).getpalette()
    palette.putpalette([255 if value > 247 else value for value in colours])    # white stays white
    pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    pages[0].save(options.out, save_all=True, append_images=pages[1:], loop=0,
                  duration=[800, *[100] * (len(pages) - 2), 3000])
