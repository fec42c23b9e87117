"""One checker for the options of all four `build`s.

The signature of the network that takes an option gives the option's type. The type says which values are allowed:

    int                     a whole number, at least 1
    float                   a number, at least 0
    Annotated[int, 0]       another limit: at least 0. Annotated[float, 0, 10]: from 0 to 10
    bool                    True or False
    Literal["a", "b"]       one of these
    int | None              either
    list[int]               a list or tuple of such values
    a TypedDict             a dict with exactly its keys

An option that has no type, or any other type, is not checked here. The papers share the options of the diffusion: their
types are in `DIFFUSION`.
"""
import inspect
import math
import types
import typing
from typing import Annotated, Literal

from diffusion import SCHEDULES, UserError

DIFFUSION = {"schedule": Literal[tuple(SCHEDULES)], "predict": Literal["eps", "v", "x0"],
             "variance": Literal["small", "large", "learned"], "T": int, "min_snr": float | None,
             "max_snr": float | None, "t_normal": list[Annotated[float, -10, 10]] | None,
             "cfg_below": Annotated[float, 0, 1]}
NOT_OPTIONS = {"shape", "num_classes", "text", "learn_sigma"}           # `build` itself gives these to a network


def checked(paper, presets, preset, options, network, diffusion=DIFFUSION):
    """The settings of a preset, with `options` in place of some of them -> a new dict.

    paper       its name, for messages
    presets     {name: {option: value}}
    network     the class or function whose signature has the types
    diffusion   {option: type} for what the signature lacks; {} if it lacks nothing

    Raises UserError for a preset or an option that does not exist, and for a value that is not of its type.
    """
    if preset not in presets:
        raise UserError(f"unknown preset {preset!r}: {paper} has {', '.join(presets)}")
    own = inspect.signature(network, eval_str=True).parameters.values()
    kinds = {p.name: p.annotation for p in own if p.kind is not p.VAR_KEYWORD and p.name not in NOT_OPTIONS}
    kinds |= diffusion
    settings = {**presets[preset], **options}
    for key, value in settings.items():
        if key not in kinds:
            raise UserError(f"unknown option {key!r}: {paper} has {', '.join(kinds)}")
        fits, words = rule(kinds[key])
        if not fits(value):
            raise UserError(f"unknown {key} {value!r}: choose {words}" if typing.get_origin(kinds[key]) is Literal else
                            f"{key}={value!r}: must be {words}")
    return settings


def rule(kind, low=None, high=math.inf):
    """A type -> a function that tells if a value is of this type, and words that say what such a value is."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind in (int, float):                                # True is an int to Python, not to us; nan fits no limit
        low = (1 if kind is int else 0) if low is None else low
        limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        return (lambda v: type(v) in (int, kind) and low <= v <= high and v != math.inf,
                f"a {'whole ' * (kind is int)}number, {limits}")
    if kind is bool:
        return lambda v: type(v) is bool, "True or False"
    if kind is type(None):
        return lambda v: v is None, "None"
    if origin is Annotated:
        return rule(*inside)
    if origin is Literal:                                   # 1 is not True, nor 1.0
        return lambda v: any(type(v) is type(x) and v == x for x in inside), " or ".join(map(str, inside))
    if origin is list:
        fits, words = rule(*inside)
        return lambda v: isinstance(v, (list, tuple)) and all(map(fits, v)), f"a list, each {words}"
    if typing.is_typeddict(kind):
        rules = {name: rule(inner) for name, inner in typing.get_type_hints(kind, include_extras=True).items()}
        return (lambda v: isinstance(v, dict) and v.keys() == rules.keys() and all(
                    fits(v[name]) for name, (fits, _) in rules.items()),
                "a dict of " + " and ".join(f"{name} ({words})" for name, (_, words) in rules.items()))
    if origin in (typing.Union, types.UnionType):
        tests, words = zip(*map(rule, inside))
        return lambda v: any(test(v) for test in tests), ", or ".join(words)
    return lambda v: True, ""
