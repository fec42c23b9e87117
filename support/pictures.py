"""Tensors to pictures, grids and films, and those to files."""
import os
import textwrap
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw

# --- drawing ----------------------------------------------------------------------------------

def to_uint8(x):
    """[-1, 1] (B, C, H, W) -> uint8 numpy (B, H, W, C); videos (B, C, T, H, W) -> (B, T, H, W, C)."""
    x = (x.float().cpu() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return rearrange(x, "b c ... h w -> b ... h w c").numpy()            # (B, [T,] H, W, C)


def to_pil(image):
    """uint8 (H, W, 1 or 3) -> PIL image."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def grid_image(images, rows, names=None, zoom=None):
    """uint8 (B, H, W, C), image i in row i % rows -> PIL image; names are written beside the rows. Of videos
    (B, T, H, W, C) the frames follow one another in a row."""
    if images.ndim == 5:
        images = np.pad(images, ((0, -len(images) % rows), *[(0, 0)] * 4), constant_values=255)
        images = rearrange(images, "(col row) t h w c -> (col t row) h w c", row=rows)    # (B T, H, W, C)
    B, H, W, C = images.shape
    zoom = zoom or max(1, round(56 / min(H, W)))          # a 28 px digit is small on a screen
    images = np.pad(images, ((0, -B % rows), (0, 0), (0, 0), (0, 0)), constant_values=255)
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    sheet = rearrange(images, "(col row) h w c -> (row h) (col w) c", row=rows)
    sheet = sheet.repeat(zoom, 0).repeat(zoom, 1)
    picture = to_pil(sheet if C == 1 else sheet[..., :3])
    if not names:
        return picture
    names = [textwrap.shorten(name, 40, placeholder=" ...") for name in names]          # captions can be long
    margin = 12 + max(int(ImageDraw.Draw(picture).textlength(n)) for n in names)
    labelled = Image.new("RGB", (margin + picture.width, picture.height), "white")
    labelled.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(labelled)
    for r, name in enumerate(names):
        draw.text((6, (r + 0.5) * picture.height / rows - 6), name, fill="black")
    return labelled


def side_by_side(levels):
    """Every resolution of an mdm, coarsest first -> one picture (N, C, [T,] H, R W), the coarse ones
    magnified, a single frame standing still."""
    size = levels[-1].shape[2:]
    levels = [x if x.ndim == len(size) + 2 else x[:, :, None] for x in levels]   # (N, C, [T or 1,] H_r, W_r)
    return torch.cat([torch.nn.functional.interpolate(x, size, mode="nearest") for x in levels], dim=-1)


def save_image(image, path, **options):
    """PIL image -> file, written aside and renamed: a killed run leaves no half a picture."""
    path = Path(path)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        image.save(part, **options)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_gif(frames, path, milliseconds):
    """PIL images -> file, each shown for so long, over and over."""
    save_image(frames[0], path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
