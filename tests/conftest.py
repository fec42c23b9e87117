"""The whole suite runs as two processes side by side, since most machines have two cores and it has many
tests of one: the files in `OTHERS` in a second pytest, whose output follows. Any narrower call is one process.
"""
import os
import subprocess
import sys

# before torch is imported: threads would only compete, in tests and in what they start
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

OTHERS = ["test_train.py", "test_faults.py", "test_cunet.py", "test_latents.py", "test_evidence.py"]
RUNNING = OUTPUT = None

if not torch.cuda.is_available():       # before anything imports Triton: kernels then run, slowly, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config, items):
    global RUNNING
    others = [item for item in items if item.path.name in OTHERS]
    whole = config.args == config.getini("testpaths") and not config.option.keyword
    if not whole or config.option.collectonly or os.cpu_count() == 1 or len(others) == len(items):
        return
    items[:] = [item for item in items if item not in others]
    RUNNING = subprocess.Popen([sys.executable, "-m", "pytest", "-q", *sorted({str(i.path) for i in others})],
                               cwd=config.rootpath, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def pytest_sessionfinish(session):
    global OUTPUT
    if RUNNING is None:
        return
    if session.shouldstop or session.shouldfail:        # -x, Ctrl-C
        RUNNING.terminate()
    OUTPUT, _ = RUNNING.communicate()
    session.exitstatus = session.exitstatus or RUNNING.returncode


def pytest_terminal_summary(terminalreporter):
    if OUTPUT:
        terminalreporter.section("the other process, exit status " + str(RUNNING.returncode))
        terminalreporter.write(OUTPUT)
