import os

import torch

if not torch.cuda.is_available():       # before anything imports Triton: kernels then run, slowly, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
