"""Lets a file called dis.py live beside Python's own module `dis`.

`import torch` imports `inspect`, which imports `dis`. With this project's folder first on sys.path, as in
`python train.py`, Python finds our dis.py instead. Our file sees that it is imported under the name `dis`. Then it
imports this file, which puts Python's own module in its place.

After that Python still runs the rest of dis.py, while torch is only half imported. So this file also gives out
stand-ins for the names that dis.py uses at module level. This has a price: outside of functions dis.py may use no
other names, and compute nothing.

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
    """Every attribute, call and item of a class of this type is the class itself."""
    __getattr__ = __call__ = __getitem__ = lambda cls, *args, **kwargs: cls


class nn(metaclass=Anything):
    """Stands in for torch.nn."""


Literal = nn


def load(name, path):
    """Runs the file at `path` as a module, keeps it in sys.modules under `name`, and returns it."""
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
