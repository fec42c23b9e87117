"""One checker for the options of the four `build`s. What an option may be stands in the signature of the network
that takes it, as a type:

    int                       a whole number, at least 1          Annotated[int, 0]: at least 0
    float                     a number, at least 0                bool, or Literal["a", "b"]: one of these
    ... | None                also None

The options of the diffusion (schedule, predict ...) are checked here for all four.
"""
import inspect
import math
import types
import typing
from typing import Annotated, Literal

from diffusion import SCHEDULES, UserError

DIFFUSION = {"schedule": Literal[tuple(SCHEDULES)], "predict": Literal["eps", "v", "x0"],
             "variance": Literal["small", "large", "learned"], "T": int, "min_snr": float | None}
NOT_OPTIONS = ("self", "shape", "num_classes", "text", "learn_sigma")       # build's own business


def checked(paper, presets, preset, options, network, diffusion=DIFFUSION):
    """The preset's settings with `options` in their place -> a dict. Raises UserError, with the fix, for a preset
    or an option that does not exist, and for a value that is not of the type.

    paper: its name, for the message. network: the class or function whose signature has the types."""
    if preset not in presets:
        raise UserError(f"unknown preset {preset!r}: {paper} has {', '.join(presets)}")
    hints = typing.get_type_hints(getattr(network, "__init__", network) if inspect.isclass(network) else network,
                                  include_extras=True)
    kinds = {k: hints.get(k) for k in inspect.signature(network).parameters if k not in NOT_OPTIONS} | diffusion
    config = {**presets[preset], **options}
    for key, value in config.items():
        if key not in kinds:
            raise UserError(f"unknown option {key!r}: {paper} {preset} has {', '.join(kinds)}")
        if kinds[key] is not None:
            check(key, value, kinds[key])
    return config


def check(key, value, kind, low=None):
    """Raises UserError if `value` is not of the type `kind`."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):                           # kind | None
        if value is not None:
            check(key, value, *(k for k in inside if k is not type(None)))
    elif origin is Annotated:
        check(key, value, *inside)
    elif origin is Literal:
        if value not in inside or type(value) is not type(inside[0]):
            raise UserError(f"unknown {key} {value!r}: choose {' or '.join(map(str, inside))}")
    elif kind is int:
        low = 1 if low is None else low
        if type(value) is not int or value < low:
            raise UserError(f"{key}={value!r}: must be a whole number, at least {low}")
    elif kind is float:
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise UserError(f"{key}={value!r}: must be a number, at least 0")
    elif kind is bool and type(value) is not bool:
        raise UserError(f"{key}={value!r}: must be True or False")
