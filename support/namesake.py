"""Lets a file called dis.py live beside Python's own module `dis`.

`import torch` imports `inspect`, which imports `dis`. With this project's folder first on sys.path, as in
`python train.py`, Python finds our dis.py instead. Our file notices it by its name and imports this one, which
puts Python's own module into its place.

The import system then still runs the rest of dis.py, and torch is only half imported by then. So this file also
gives out stand-ins for the names that dis.py uses at module level. The price: outside of functions dis.py may
use no other names, and compute nothing.

`from dis import DiS` works all the same: Python's module hands out the names in NAMES, and loads our file when
it is first asked.
"""
import importlib.util
import os
import runpy
import sys

NAMES = ("DiS", "CONFIGS", "build", "selective_scan", "selective_scan_ref")
OURS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "dis.py")
PYTHONS = os.path.join(os.path.dirname(os.__file__), "dis.py")


class Anything(type):
    """A class of this type is also what each of its attributes, calls and items is."""
    __getattr__ = __call__ = __getitem__ = lambda cls, *args, **kwargs: cls


class nn(metaclass=Anything):
    """Stands in for torch.nn."""


Literal = nn


def load(name, path):
    """The module that is made from the file, under this name in sys.modules."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def ours(name):
    """Called when Python's `dis` lacks an attribute. support/checkpoint.py uses the same key "dis_paper"."""
    if name not in NAMES:
        raise AttributeError(f"module 'dis' has no attribute {name!r}")
    return getattr(sys.modules.get("dis_paper") or load("dis_paper", OURS), name)


load("dis", PYTHONS).__getattr__ = ours
if getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None) == "dis":      # python -m dis
    runpy.run_path(PYTHONS, run_name="__main__")
    sys.exit()
