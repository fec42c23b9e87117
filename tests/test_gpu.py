"""What can be known of a GPU without one. tests/simulate.py runs train.py and sample.py with tensors that say that they
lie on a GPU, and watches every operation. Here each test looks at one thing.

Nothing is known of kernels (tests/test_fused.py runs Triton's in its interpreter), of their order, memory or speed.
"""
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
SMALL = ["--model", "mdm", "--image-size", "16", "--set", "side=8", "channels=[8,16]", "text_width=16", "embedding=32"]
NETWORKS = {                                    # one of each kind of preset, as small as can be
    "dis tiny": ["--set", "depth=2", "--grad-accum", "2", "--max-steps", "2"],
    "DiS-S": ["--preset", "DiS-S/2", "--set", "depth=2", "width=16", "drop_path=0.1", "min_snr=5",
              "--weight-decay", "0.1", "--hflip", "--image-size", "8", "--grad-checkpointing"],
    "diffussm tiny": ["--model", "diffussm", "--set", "depth=1", "--image-size", "8"],
    "DiffuSSM-S": ["--model", "diffussm", "--preset", "DiffuSSM-S", "--set", "depth=1", "width=16", "init=legs",
                   "discretization=bilinear", "--image-size", "8", "--grad-checkpointing"],
    "mdm classes": [*SMALL],
    "mdm text": [*SMALL, "micro=True", "layers=1", "predict=v", "--cond", "text", "--grad-checkpointing"],
    "mdm mixed": [*SMALL, "mixed=[1,0.5]"],
    "mdm video": [*SMALL, "--preset", "tiny-video", "--data", "moving", "--frames", "2"],
    "cunet tiny": ["--model", "cunet", "--set", "nf=4", "inner_time=True", "--image-size", "8"],
    "cunet published": ["--model", "cunet", "--preset", "published", "--set", "nf=4", "--image-size", "17",
                        "--num-classes", "0"],
    "unet": ["--model", "cunet", "--preset", "unet", "--set", "dim=8", "--image-size", "8", "--grad-checkpointing"],
    "your own": ["--model", str(HERE.parent / "examples/mypaper.py"), "--image-size", "8"]}
ONE = {"dis tiny": "fp32", "diffussm tiny": "bf16", "mdm classes": "bf16", "mdm mixed": "fp32",
       "cunet published": "bf16", "your own": "fp32"}               # much like another one: one precision is enough
ALL = [f"{name}, {precision}" for name in NETWORKS for precision in ([ONE[name]] if name in ONE else ["fp32", "bf16"])]
FP32 = [name for name in ALL if name.endswith("fp32")]
BLOCKS = {"rk4": {}, "recomputed": dict(gradients="checkpoint"), "midpoint": dict(solver="midpoint", steps=2),
          "adjoint": dict(gradients="adjoint", steps=4), "dopri5": dict(solver="dopri5")}
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """All that simulate.py tells: {name: {..}}."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if platform.system() != "Linux" or not compiler:
        pytest.skip("simulating a GPU needs Linux and a C++ compiler")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("simulating a GPU needs a PyTorch that knows none: the one for CPUs")
    folder, torch_folder = tmp_path_factory.mktemp("gpu"), Path(torch.__file__).parent
    library, pictures = folder / "fake_cuda.so", folder / "pictures"
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", HERE / "fake_cuda.cpp", "-o", library,
                    f"-I{torch_folder}/include", f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib",
                    "-lc10", "-ltorch_cpu"], check=True)
    for label in "ab":
        (pictures / label).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(pictures / label / "0.png")
    (pictures / "metadata.csv").write_text("file_name,text\na/0.png,night\nb/0.png,a raven at night\n")
    cases = {name: [*NETWORKS[name.rsplit(", ", 1)[0]], "--precision", name.rsplit(", ", 1)[1]] for name in ALL}
    done = subprocess.run([sys.executable, HERE / "simulate.py", pictures], input=json.dumps(cases | BLOCKS), text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": library}, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def told(seen, name):
    assert seen[name]["error"] is None, seen[name]["error"]
    return seen[name]


def batch(flags):
    """How many tensors the CPU sends to the GPU: seeds, pictures, and classes, or captions with their mask."""
    return 4 if "text" in flags else 2 if "0" in flags[-1:] else 3


@pytest.mark.parametrize("name", ALL)
def test_training_and_drawing_run(seen, name):
    """No operation mixes devices or types. Gradients, and what the diffusion reads as prediction, are float32."""
    assert told(seen, name)["gradients"] == ["torch.float32 cuda:0"]
    assert told(seen, name)["predictions"] == ["torch.float32"]


@pytest.mark.parametrize("name", ALL)
def test_training_waits_for_nothing(seen, name):
    """The CPU sends a batch, without waiting. In the first step it also sends the tables of the diffusion."""
    flags = NETWORKS[name.rsplit(", ", 1)[0]]
    first, *others = told(seen, name)["training"]
    copies = {"train.make_batch": batch(flags) * (2 if "--grad-accum" in flags else 1)}
    if "drop_path=0.1" in flags:
        copies["train.main"] = 1                # seeds
    if "mixed=[1,0.5]" in flags:
        copies["mdm.mixed_errors"] = 2          # the order of the rows, and which resolutions they have
    assert first["waits"].keys() == {"diffusion.at"}
    assert [first["copies"], *others] == [copies, *[{"copies": copies, "waits": {}} for _ in others]]


@pytest.mark.parametrize("name", ALL)
def test_drawing_waits_at_its_ends(seen, name):
    """The CPU sends seeds, classes or captions, and the tables of the diffusion. At the end it gets the pictures."""
    drawing = told(seen, name)["drawing"]
    assert not drawing["copies"] and drawing["waits"].keys() == {"sample.generate", "diffusion.at"}
    assert drawing["waits"]["sample.generate"] == batch(NETWORKS[name.rsplit(", ", 1)[0]])


@pytest.mark.skipif(TORCH < (2, 13), reason="PyTorch 2.7 has no erfc and no avg_pool3d for MPS; 2.13 has them")
@pytest.mark.parametrize("name", [*FP32, *BLOCKS])
def test_apples_gpus_have_all_operations(seen, name):
    """Nothing is float64, no integer is larger than MPS takes, and PyTorch has a kernel for each operation; also inside
    the scan and the convolution of support/."""
    assert told(seen, name)["mps"] == []


@pytest.mark.parametrize("name, waits", [("rk4", 0), ("recomputed", 0), ("midpoint", 10), ("adjoint", 27)])
def test_waits_of_a_block_of_cunet(seen, name, waits):
    """These numbers are in docs/scaling.md."""
    assert sum(told(seen, name)["waits"].values()) == waits
    assert sum(told(seen, "dopri5")["waits"].values()) > 27             # in so many steps as it takes
