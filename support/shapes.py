"""Drawn data: eight shapes in six colours and two sizes, still or moving.

An example is a function of its index: nothing is random, and nothing is stored. `still` and `moving` return what
`datasets.Dataset` is made of.
"""
import functools
import math

import numpy as np

# A shape is a function: the signed distance to its outline, negative inside. The unit is its radius; x points right and
# y up. The shape fits the square from -1 to 1. Distances must be right only near the outline. There they become the
# share of a pixel that the shape covers, so that edges are smooth.

def star(x, y, points, inner):
    """Tips at radius 1, one of them up; notches at radius `inner`."""
    half = math.pi / points                                 # the angle from a tip to a notch
    angle = np.abs((np.arctan2(x, y) + half) % (2 * half) - half)       # folded, so that one edge remains
    r = np.hypot(x, y)
    dx, dy = inner * math.cos(half) - 1, inner * math.sin(half)         # from the tip (1, 0) to the notch
    return ((r * np.cos(angle) - 1) * dy - r * np.sin(angle) * dx) / math.hypot(dx, dy)


def heart(x, y):
    """A square that stands on a corner, and a disc on each of its upper sides. h is half the square's diagonal."""
    h = 2 / (1 + math.sqrt(2))
    x, y = np.abs(x), y + 0.086                             # centred in height
    return np.minimum((x + np.abs(y) - h) * math.sqrt(0.5), np.hypot(x - h / 2, y - h / 2) - h * math.sqrt(0.5))


SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.88,
    "triangle": lambda x, y: star(x, y + 0.2, 3, 0.5) - 0.04,
    "cross": lambda x, y: np.minimum(np.maximum(np.abs(x) - 1, np.abs(y) - 0.3),
                                     np.maximum(np.abs(y) - 1, np.abs(x) - 0.3)),
    "star": lambda x, y: star(x, y, 5, 0.5),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.76) - 0.24,
    "heart": heart,
    "moon": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.82 - np.hypot(x - 0.5, y - 0.15)),
}
COLOURS = {"red": (214, 39, 40), "orange": (250, 135, 20), "yellow": (238, 210, 20),
           "green": (34, 150, 60), "blue": (40, 90, 220), "purple": (140, 50, 190)}
BACKGROUND = (245, 244, 240)
SIZES = {"small": 0.30, "big": 0.42}                        # radius / the picture's shorter side
MOVING_SIZES = {"small": 0.17, "big": 0.25}                 # smaller, to have room to move
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}      # as y, x


def draw_shapes(kind, centre, radius, colour, H, W):
    """One shape a picture -> uint8 (B, 3, H, W). The frames of a clip are a batch like any other.

    kind (B,) numbers in SHAPES; centre (B, 2) as y, x from the top left corner and radius (B,), both in pixels;
    colour (B, 3) from 0 to 255.
    """
    scale = radius.astype(np.float32)[:, None, None]
    y = (centre[:, :1, None] - 0.5 - np.arange(H)[:, None]) / scale                 # (B, H, 1)
    x = (np.arange(W) + 0.5 - centre[:, 1:, None]) / scale                          # (B, 1, W)
    x, y = x.astype(np.float32), y.astype(np.float32)
    distance = np.empty((len(kind), H, W), np.float32)
    for k, signed_distance in enumerate(SHAPES.values()):
        these = kind == k
        distance[these] = signed_distance(x[these], y[these])
    cover = np.clip(0.5 - distance * scale, 0, 1)[:, None]                          # (B, 1, H, W)
    paper = np.array(BACKGROUND, np.float32)[:, None, None]                         # (3, 1, 1)
    ink = np.asarray(colour, np.float32)[:, :, None, None]                          # (B, 3, 1, 1)
    return (paper + cover * (ink - paper) + 0.5).astype(np.uint8)                   # (B, 3, H, W)


def attributes(split, sizes, shorter_side):
    """What each example shows: index, kind, caption, place in the unit square, radius in pixels, colour. The indices of
    the test split follow those of the training split."""
    i = np.arange(65536) if split == "train" else np.arange(65536, 65536 + 4096)
    kind, colour, big = i % 8, i // 8 % 6, i // 48 % 2      # all combinations, about equally often
    kinds, colours, names = list(SHAPES), list(COLOURS), list(sizes)
    captions = [f"a {names[b]} {colours[c]} {kinds[k]}" for k, c, b in zip(kind, colour, big)]
    # the multiples of two irrational numbers, modulo 1, fill a square more evenly than random points
    place = i[:, None] * np.array([0.7548776662466927, 0.5698402909980532]) % 1     # (N, 2)
    radius = np.array(list(sizes.values()))[big] * shorter_side                     # (N,)
    ink = np.array(list(COLOURS.values()))[colour]                                  # (N, 3)
    return i, kind, captions, place, radius, ink


def still(size, split):
    """Pictures (3, H, W). size: (H, W)."""
    i, kind, captions, place, radius, ink = attributes(split, SIZES, min(size))
    margin = radius[:, None] + 0.5                          # half a pixel for the smooth edge
    centre = margin + place * (np.array(size) - 2 * margin)                         # (N, 2)
    images = functools.partial(draw, kind, centre, np.zeros((len(i), 2)), radius, ink, 1, *size)
    return dict(name="shapes", shape=(3, *size), images=images, length=len(i), labels=kind,
                class_names=list(SHAPES), captions=captions)


def moving(size, split, frames):
    """Clips (3, T, H, W) with T = `frames`; pictures, if T is 1. Each shape has a constant speed, and all of it stays
    inside the picture."""
    i, kind, captions, place, radius, ink = attributes(split, MOVING_SIZES, min(size))
    direction = i // 96 % 4                                 # each combination moves in all directions
    captions = [f"{c} moving {list(DIRECTIONS)[d]}" for c, d in zip(captions, direction)]
    room = np.array(size) - 2 * radius[:, None] - 1         # for the centre, (N, 2)
    way = np.array(list(DIRECTIONS.values()))[direction] * np.minimum(0.4 * np.array(size), room)
    start = radius[:, None] + 0.5 + place * (room - abs(way)) - np.minimum(way, 0)  # (N, 2), as way
    shape = (3, frames, *size) if frames > 1 else (3, *size)
    images = functools.partial(draw, kind, start, way, radius, ink, frames, *size)
    return dict(name="moving", shape=shape, images=images, length=len(i), labels=kind,
                class_names=list(SHAPES), captions=captions)


def draw(kind, start, way, radius, ink, T, H, W, rows):
    share = np.linspace(0, 1, T)[:, None]                   # of the way, (T, 1)
    centre = (start[rows, None] + way[rows, None] * share).reshape(-1, 2)           # (B T, 2)
    kind, radius, ink = (np.repeat(a[rows], T, 0) for a in (kind, radius, ink))
    frames = draw_shapes(kind, centre, radius, ink, H, W)                           # (B T, 3, H, W)
    if T == 1:
        return frames                                                               # (B, 3, H, W)
    return np.ascontiguousarray(frames.reshape(-1, T, 3, H, W).swapaxes(1, 2))      # (B, 3, T, H, W)
