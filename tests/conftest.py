"""What every test process sets before torch is imported, and which tests stay together in one process. pytest-xdist
starts one process a core (pyproject.toml)."""
import os
from pathlib import Path

# One thread each: the processes share the cores already, and so do the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():       # before anything imports Triton: its kernels then run, slowly, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(optionalhook=True)                     # without pytest-xdist there is no such hook
def pytest_xdist_make_scheduler(config, log):
    """Each test goes to the first process that is free. Only the tests of a file with a fixture for all of them stay
    together, because another process would make it again. (Marks of xdist_group would do the same, but in pytest 9.2
    pytest-xdist 3.8 does not see them.)"""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return file if file in together else nodeid
    files = Path(__file__).parent.glob("test_*.py")
    together = {f.relative_to(config.rootpath).as_posix() for f in files if 'scope="module"' in f.read_text("utf8")}
    return Scheduling(config, log)


COUNTS = {}


@pytest.fixture
def counted_once(monkeypatch):
    """For tests that are not about counting: every run counts its multiply-adds before the first step, and that takes
    longer than a few steps. Networks that are alike are counted once in each test process."""
    from support import cost
    count = cost.multiply_adds

    def once(model, diffusion, batch):
        alike = repr([(type(m), [(k, v) for k, v in vars(m).items() if isinstance(v, (int, float, str, tuple))])
                      for m in model.modules()]), repr(model), repr({k: v.shape for k, v in batch.items()})
        if alike not in COUNTS:
            COUNTS[alike] = count(model, diffusion, batch)
        return COUNTS[alike]
    monkeypatch.setattr(cost, "multiply_adds", once)
