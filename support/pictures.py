"""From tensors to pictures, grids and films, and from those to files."""
import contextlib
import functools
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from diffusion import UserError

# Pillow's own font has the letters of English. These have others, where a system has them: Linux, macOS, Windows.
FONTS = "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf", "msyh.ttc", "malgun.ttf"

# --- tensors to pictures ------------------------------------------------------------------------

def decoder(space, vae):
    """-> a function from what a model draws to pictures (B, 3 or 1, H, W) in [-1, 1].

    space: the training's args["space"]. None: the model draws pictures, and they stay as they are. Otherwise it
    draws latents (B, C, h, w). vae: the `latents.VAE` that decodes them; None: show them in false colours.
    """
    if space and vae:
        at_once = 4                             # 512 x 512 pixels need a GiB while they are decoded
        return lambda z: torch.cat([vae.decode(part, space["scale"], space["shift"]) for part in z.split(at_once)])
    if space:
        return lambda z: z[:, :3] / 3 if z.shape[1] >= 3 else z[:, :1] / 3
    return lambda x: x


def to_uint8(x):
    """[-1, 1] (B, C, H, W) -> uint8 numpy (B, H, W, C); videos (B, C, T, H, W) -> (B, T, H, W, C)."""
    x = (x.float().cpu() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return rearrange(x, "b c ... h w -> b ... h w c").numpy()                            # (B, [T,] H, W, C)


def side_by_side(levels):
    """Every resolution of an mdm, coarsest first -> one picture (N, C, [T,] H, levels * W). The coarse ones are
    magnified. In a video, a level with a single frame stands still."""
    size = levels[-1].shape[2:]
    levels = [x if x.ndim == len(size) + 2 else x[:, :, None] for x in levels]           # (N, C, [T or 1,] h, w)
    return torch.cat([torch.nn.functional.interpolate(x, size, mode="nearest") for x in levels], dim=-1)


def to_pil(image):
    """uint8 (H, W, 1 or 3) -> PIL image."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def has_letters(font, text):
    """A font draws the same box for each letter that it lacks; no font has U+FFFF."""
    try:
        box = bytes(font.getmask("\uffff"))
        return all(bytes(font.getmask(letter)) != box for letter in set(text))
    except UnicodeError:                                                                 # Pillow without FreeType
        return text.isascii()


@functools.lru_cache(maxsize=9)
def labels(names):
    """A tuple of names -> a font and what it writes beside the rows: the names, without the end of a long one. If no
    font here has their letters, the numbers of the rows; we then print, once, what they mean."""
    names = [" ".join(name.split()) for name in names]
    for file in (None, *FONTS):
        try:
            font = ImageFont.truetype(file, 11) if file else ImageFont.load_default()
        except (OSError, ImportError):
            continue
        if has_letters(font, "".join(names)):
            return font, [name if len(name) <= 40 else name[:36].rstrip() + " ..." for name in names]
    numbers = [str(row) for row in range(1, len(names) + 1)]
    tqdm.write(f"rows        {', '.join(map(' '.join, zip(numbers, names)))} (no font here has their letters)")
    return ImageFont.load_default(), numbers


SCREEN = 1600, 1200                     # pixels; a larger grid is given about this shape


def grid_image(images, rows, names=None, zoom=None, wrap=True):
    """uint8 (B, H, W, C) -> a PIL image with picture i in row i % rows.

    names: written beside the rows. zoom: how many times as large each pixel is shown. wrap: long rows are broken into
    lines, and many rows stand in columns, if the grid would not fit on a screen. Videos (B, T, H, W, C) show their
    frames side by side.
    """
    zoom = zoom or max(1, round(56 / min(images.shape[-3:-1])))         # a digit of 28 pixels is small on a screen
    images = np.pad(images, ((0, 0),) * (images.ndim - 3) + ((1, 1), (1, 1), (0, 0)), constant_values=255)
    if images.ndim == 5:
        images = rearrange(images, "b t h w c -> b h (t w) c")
    B, H, W, C = images.shape                                           # with a white border around each picture
    each, shape = math.ceil(B / rows), SCREEN[0] / SCREEN[1]            # each: pictures in a row
    lines = max(1, round(math.sqrt(each * W / (rows * H * shape)))) if wrap and each * W * zoom > SCREEN[0] else 1
    lines = math.ceil(each / math.ceil(each / lines))                   # of a row, without empty ones
    images = np.pad(images, ((0, -B % (rows * lines)), *[(0, 0)] * 3), constant_values=255)
    sheet = rearrange(images, "(line col row) h w c -> (row line h) (col w) c", row=rows, line=lines)
    picture = to_pil(sheet.repeat(zoom, 0).repeat(zoom, 1)[..., :3])
    if names:
        font, names = labels(tuple(names))
        margin = 12 + max(int(font.getlength(name)) for name in names)
        labelled = Image.new("RGB", (margin + picture.width, picture.height), "white")
        labelled.paste(picture, (margin, 0))
        draw = ImageDraw.Draw(labelled)
        for r, name in enumerate(names):
            draw.text((6, (r + 0.5) * picture.height / rows - 6), name, fill="black", font=font)
        picture = labelled
    columns = round(math.sqrt(picture.height * shape / picture.width))
    if not wrap or picture.height <= SCREEN[1] or columns < 2:
        return picture
    wide, high = picture.width, math.ceil(rows / columns) * picture.height // rows       # of a column
    screen = Image.new(picture.mode, (math.ceil(picture.height / high) * wide, high), "white")
    for c, top in enumerate(range(0, picture.height, high)):
        screen.paste(picture.crop((0, top, wide, min(top + high, picture.height))), (c * wide, 0))
    return screen


# --- a run at a glance --------------------------------------------------------------------------

SHADES = "black", "#b03060", "#d9701c", "#c9a800", "#2f8f4e", "#1f6fb4"


def marks(low, high):
    """The numbers 1, 2, 5, 10, 20 .. and 0.5, 0.2 .. from low to high."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m for e in exponents for m in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if low <= m <= high]


def chart(lines, title, width, height):
    """{name: [(x, y)]} -> a PIL image: a line for each, with its last number. All numbers are above 0, and both axes
    logarithmic."""
    xs, ys = zip(*(point for line in lines.values() for point in line))
    box, span = (60, 30, width - 200, height - 34), (min(xs), max(ys), max(xs), min(ys))    # left, top, right, bottom

    def at(number, k):                          # k: 0 for x, 1 for y -> pixels
        low, high = math.log(span[k]), math.log(span[k + 2])
        return box[k] + (box[k + 2] - box[k]) * (math.log(number) - low) / ((high - low) or 1)
    columns, rows = marks(span[0], span[2]), marks(span[3], span[1])
    picture = Image.new("RGB", (2 * width, 2 * height), "white")        # made smaller, Pillow's lines are smooth
    draw = ImageDraw.Draw(picture)
    for x, y, X, Y in [(at(x, 0), box[1], at(x, 0), box[3]) for x in columns] + [
            (box[0], at(y, 1), box[2], at(y, 1)) for y in rows]:
        draw.line((2 * x, 2 * y, 2 * X, 2 * Y), "#dddddd", 2)
    for shade, line in [*zip(SHADES, lines.values())][::-1]:
        draw.line([(2 * at(x, 0), 2 * at(y, 1)) for x, y in line], shade, 4, "curve")
    picture, font = picture.reduce(2), ImageFont.load_default(13)
    draw = ImageDraw.Draw(picture)
    draw.text((box[0], 16), title, "black", font, "lm")
    for x in columns:
        draw.text((at(x, 0), box[3] + 12), f"{x:,.0f}", "black", font, "mm")
    for y in rows:
        draw.text((box[0] - 8, at(y, 1)), f"{y:g}", "black", font, "rm")
    for i, (shade, (name, line)) in enumerate(zip(SHADES, lines.items())):
        draw.text((box[2] + 16, box[1] + 12 + 20 * i), f"{name}: {line[-1][1]:.3g}", shade, font, "lm")
    return picture


def summary(lines, grids, width=1000):
    """lines: as `chart` takes them; grids: [(title, PIL image)], to show in a row below it -> a PIL image."""
    top = chart(lines, "loss by the noise level t, at each step (both axes logarithmic)", width, 330)
    if not grids:
        return top
    height = min(300, int((width - 10 * len(grids)) / sum(grid.width / grid.height for _, grid in grids)))
    picture = Image.new("RGB", (width, top.height + height + 40), "white")
    picture.paste(top)
    x, draw = 5, ImageDraw.Draw(picture)
    for title, grid in grids:
        small = grid.convert("RGB").resize((max(1, round(height * grid.width / grid.height)), height), Image.LANCZOS)
        picture.paste(small, (x, top.height + 30))
        draw.text((x, top.height + 16), title, "black", ImageFont.load_default(13), "lm")
        x += small.width + 10
    return picture


# --- pictures to files --------------------------------------------------------------------------

MOST = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383, ".gif": 65535}      # pixels a side, as Pillow can write them


def make_folder(folder):
    """Make it if it is not there. Raises UserError if we cannot write into it."""
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write into {folder}: choose another folder")


def refuse_old(folder):
    """Raises UserError if the folder holds images that are named as `save_each` does. They may be the user's own, or
    more than the new ones, which would then lie among them."""
    old = [name for name in sorted(os.listdir(folder)) if re.fullmatch(r"\d{6,}\.(png|gif)", name)]
    if old:
        raise UserError(f"{folder} already holds {old[0]}: choose another --save-images, or delete those images")


def save_image(image, path, **options):
    """PIL image -> file -> its path. It is written under another name and then renamed: a killed run leaves no half
    picture. An image too large for the format becomes a PNG, and a film an animated PNG. Raises OSError."""
    path = Path(path)
    if max(image.size) > MOST.get(path.suffix.lower(), math.inf):
        print(f"{image.width} x {image.height} pixels are too many for a {path.suffix}: it becomes a PNG")
        path = Path(f"{path}.png")
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        image.save(part, **options)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def save_gif(frames, path, milliseconds):
    """PIL images -> a film that repeats -> its path. Each frame is shown for `milliseconds`."""
    return save_image(frames[0], path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def save_each(images, folder):
    """uint8 (N, H, W, C) -> folder/000000.png and so on; videos (N, T, H, W, C) -> .gif. -> "PNGs" or "GIFs"."""
    for i, image in enumerate(images):
        path = Path(folder) / f"{i:06d}"
        if images.ndim == 5:
            save_gif([to_pil(frame) for frame in image], path.with_suffix(".gif"), 120)
        else:
            save_image(to_pil(image), path.with_suffix(".png"))
    return "GIFs" if images.ndim == 5 else "PNGs"
