"""Processes as torchrun starts them, in a fraction of the time: each is forked from one that has imported PyTorch
already. What torchrun itself does (passing signals on, ending the others) is tested with torchrun."""
import multiprocessing
import os
import socket
import sys
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "sample", "torch._dynamo", "torch.distributed.fsdp", "torchdiffeq"])


def serve():
    """Start the process from which all others are forked, if there is none yet. It must start in the repository:
    Python 3.11 does not tell it where else to look for modules, and it says nothing if it finds none."""
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)


def be(rank, local, world, port, program, argv, said, folder):
    """What each process does, in `folder`: run train.py or sample.py with these flags; or "-c", which takes the program
    itself as its first flag, like Python's. What it says goes into the file `said`."""
    os.chdir(folder)
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(local), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    import sample
    import train
    from support import cli, cost
    cost.multiply_adds = lambda *args: None     # each process would count for longer than it trains; other tests count
    sys.argv = [program, *argv]
    if program == "-c":
        code = sys.argv.pop(1)
        exec(code, {"__name__": "__main__"})
    else:
        cli.run({"train.py": train, "sample.py": sample}[program].main)


def need_shards():
    """Skip the test if this PyTorch has no shards on CPUs: see parallel.Team.spread."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("shards on CPUs were tried with PyTorch 2.13; 2.8 adds their gradients up")


def start(folder, world, program, *argv, machines=None):
    """-> the processes; what each says goes into `folder`. machines: {a folder: how many of them run in it}, as if each
    folder were a machine of its own; None: all run here."""
    port = None
    if world > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
    serve()
    Path(folder).mkdir()
    flags = [str(flag) for flag in argv]
    places = [(place, i) for place, n in (machines or {os.getcwd(): world}).items() for i in range(n)]
    processes = [CONTEXT.Process(target=be, args=(r, local, world, port, program, flags, f"{folder}/{r}", place))
                 for r, (place, local) in enumerate(places)]
    for process in processes:
        process.start()
    return processes


def launch(folder, world, program, *argv, **options):
    """Start processes, wait until they end -> what they said. All must succeed; if one fails, the others are killed."""
    processes = start(folder, world, program, *argv, **options)
    while alive := [p.sentinel for p in processes if p.exitcode is None]:
        if any(p.exitcode for p in processes) or not wait(alive, 200):
            break
    for process in processes:
        process.kill()
        process.join()
    said = "".join(path.read_text() for path in sorted(Path(folder).iterdir()))
    assert [p.exitcode for p in processes] == [0] * world, said
    return said
