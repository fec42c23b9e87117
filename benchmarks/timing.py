"""What the benchmarks share: times of things that take turns, peaks of memory in fresh processes, tables."""
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

median = statistics.median


def milliseconds(function, device, times=1):
    """Of one call, the average of so many."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return 1e3 * (time.perf_counter() - start) / times


def turns(functions, device, rounds, times=1):
    """-> for each the milliseconds of each round, after one to warm up. They take turns, since on a noisy
    machine only what is measured side by side can be compared: see `ratio`."""
    records = [[] for _ in functions]
    for i in range(rounds + 1):
        for function, record in zip(functions, records):
            took = milliseconds(function, device, times)
            if i:
                record.append(took)
    return records


def ratio(records, others):
    """How many times as long the first took: median of the ratios of the rounds."""
    return median(a / b for a, b in zip(records, others))


def kilobytes(key):
    """VmRSS or VmHWM, resident memory and its peak (Linux)."""
    return int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_megabytes(function, device):
    """The most memory that a call needs beside what is there before. On a CPU (Linux) the process must be
    fresh: memory that an earlier call gave back would not be counted."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")           # the peak begins anew
    before = kilobytes("VmRSS")
    function()
    return (kilobytes("VmHWM") - before) * 1.024e-3


def in_fresh_process(*arguments):
    """What this script prints when called again with the arguments: a number; None if it failed."""
    done = subprocess.run([sys.executable, sys.argv[0], *map(str, arguments)], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else None


def table(head, rows):
    """Prints the rows, numbers to three digits, None as a dash."""
    def text(x):
        return "-" if x is None else x if isinstance(x, str) else f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"
    rows = [list(map(text, row)) for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))))
    print(flush=True)
