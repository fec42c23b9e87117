"""What every test process sets before torch is imported, and which tests stay together in one process. pytest-xdist
starts one process a core (pyproject.toml)."""
import os

# One thread each: the processes share the cores already, and so do the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():       # before anything imports Triton: its kernels then run, slowly, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """The tests of a file with a fixture for all of them stay together: another process would make it again."""
    for item in items:
        scopes = {defs[-1].scope for defs in item._fixtureinfo.name2fixturedefs.values() if defs}
        if "module" in scopes:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


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
