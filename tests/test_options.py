"""The checker of the options that users type: each type, and one sentence for what is wrong."""
import functools
import math
from typing import Annotated, Literal, Optional, TypedDict

import pytest

from diffusion import SCHEDULES, Diffusion, UserError
from support.options import DIFFUSION, checked


class Level(TypedDict):
    channels: list[int]
    drop: float


class Network:
    def __init__(self, shape, num_classes: int, width: int, *, depth: Annotated[int, 0] = 2, drop: float = 0.0,
                 gain: Annotated[float, 1] = 1.0, skip: Literal["concat", "add"] = "add", bias: bool = True,
                 patch: int | None = None, heads: Optional[Annotated[int, 2]] = None,
                 size: int | Literal["auto"] = "auto", order: Literal[1, 2] = 1, any_=None,
                 steps: Annotated[int, 1, 9] = 1, sizes: list[int] = (), level: Level | None = None, levels: tuple = (), **rest):
        pass


PRESETS = {"tiny": dict(width=8, schedule="linear"), "big": dict(width=64, depth=9, schedule="cosine", min_snr=5)}


def check(preset="tiny", network=Network, **options):
    return checked("net", PRESETS, preset, options, network)


def test_options_stand_in_place_of_the_presets_settings():
    before = {name: dict(preset) for name, preset in PRESETS.items()}
    assert check(width=16, drop=0.5) == dict(width=16, drop=0.5, schedule="linear")
    assert check("big", min_snr=None) == dict(width=64, depth=9, schedule="cosine", min_snr=None)
    assert PRESETS == before


@pytest.mark.parametrize("key, values", [
    ("width", [1, 10**6]), ("depth", [0, 3]), ("drop", [0, 0.0, 1, 2.5]), ("gain", [1, 1.5]),
    ("skip", ["concat", "add"]), ("bias", [True, False]), ("patch", [None, 4]), ("heads", [None, 2]),
    ("size", [3, "auto"]), ("order", [1, 2]), ("steps", [1, 9]), ("sizes", [(), [1, 2]]),
    ("level", [None, dict(channels=(8,), drop=0.5)]),
    ("any_", [None, "x", math.nan]), ("levels", [(1, 2), 3]), ("schedule", list(SCHEDULES)), ("T", [1, 1000]),
    ("predict", ["eps", "v", "x0"]), ("variance", ["small", "large", "learned"]), ("min_snr", [None, 5, 0.5])])
def test_good_values_come_back_as_they_are(key, values):
    for value in values:
        assert check(**{key: value})[key] is value


WHOLE, NUMBER = "must be a whole number, at least 1", "must be a number, at least 0"


@pytest.mark.parametrize("key, values, words", [
    ("width", [0, -1, True, 2.0, math.nan, "8", None, [8]], WHOLE), ("depth", [-1, False], "at least 0"),
    ("drop", [-0.1, math.nan, math.inf, True, "0.5", None], NUMBER), ("gain", [0.5], "a number, at least 1"),
    ("skip", ["residual", "", None, 1, ["add"]], "unknown skip .*: choose concat or add"),
    ("bias", [0, 1, None, "True"], "must be True or False"), ("patch", [0, True, "4"], f"{WHOLE}, or None"),
    ("heads", [1], "at least 2, or None"), ("size", [0, "big"], f"{WHOLE}, or auto"),
    ("order", [3, True, 1.0, "1"], "unknown order .*: choose 1 or 2"), ("steps", [0, 10], "a whole number, from 1 to 9"),
    ("sizes", [3, (1, 0), [True]], "a list, each a whole number, at least 1"),
    ("level", [{}, dict(channels=(8,)), dict(channels=8, drop=0), dict(channels=(8,), drop=0, more=1)], "a dict of channels"),
    ("schedule", ["sigmoid", ["linear"]], "unknown schedule .*: choose linear or cosine"), ("T", [0, 1e3], WHOLE),
    ("predict", ["noise"], "eps or v or x0"), ("variance", ["fixed"], "small or large or learned"),
    ("min_snr", [-1, math.nan, False], f"{NUMBER}, or None")])
def test_bad_values_are_refused_in_one_sentence(key, values, words):
    for value in values:
        with pytest.raises(UserError, match=words) as e:
            check(**{key: value})
        assert key in str(e.value) and repr(value) in str(e.value) and "\n" not in str(e.value)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(UserError, match="unknown preset 'huge': net has tiny, big"):
        check("huge")
    for key in ("widht", "num_classes", "shape", "rest", "self"):
        with pytest.raises(UserError, match=f"unknown option '{key}': net has width, depth.*schedule.*min_snr.*cfg_below$"):
            check(**{key: 1})


def test_a_presets_own_mistake_is_found_too():
    with pytest.raises(UserError, match="width=0"):
        checked("net", {"tiny": dict(width=0)}, "tiny", {}, Network)


def function(shape, width: "int", predict: Literal["x0"] = "x0"):
    """Types as strings, as `from __future__ import annotations` leaves them."""


def test_a_paper_may_say_which_options_its_diffusion_has():
    few = functools.partial(checked, "net", {"tiny": dict(width=8)}, "tiny", network=function)
    assert few(options=dict(T=10), diffusion={"T": DIFFUSION["T"]}) == dict(width=8, T=10)
    assert few(options=dict(predict="x0"), diffusion={}) == dict(width=8, predict="x0")
    for options in (dict(width=True), dict(predict="eps"), dict(T=10)):
        with pytest.raises(UserError, match="whole number|choose x0|net has width, predict$"):
            few(options=options, diffusion={})


def test_the_diffusion_takes_its_options_out():
    options = check("big", predict="v", T=50)
    d = Diffusion.of(options)
    assert options == dict(width=64, depth=9)
    assert (d.T, d.predict, d.variance, d.min_snr) == (50, "v", "small", 5)
    assert d.alpha_bar.equal(SCHEDULES["cosine"](50))
