"""What every test process sets before torch is imported. pytest-xdist starts one process a core (pyproject.toml)."""
import os

# One thread each: the processes share the cores already, and so do the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():       # before anything imports Triton: its kernels then run, slowly, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
