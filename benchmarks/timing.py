"""What the benchmarks share: times of functions that take turns, peaks of memory in new processes, tables. Import it
first: it finds support/, which comes before torch."""
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import support  # noqa: E402, F401 (before torch)
import torch  # noqa: E402


def milliseconds(function, device, times=1):
    """How long one call takes: the average of `times` calls."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return 1e3 * (time.perf_counter() - start) / times


def turns(functions, device, rounds, times=1):
    """-> for each function a list: its milliseconds in each round. One more round comes first, to warm up. The
    functions take turns: on a busy machine only times measured side by side can be compared, see `ratio`."""
    rows = [[milliseconds(function, device, times) for function in functions] for _ in range(rounds + 1)]
    return [list(record) for record in zip(*rows[1:])]


def ratio(records, others):
    """The time of the first function divided by that of the second: the median over the rounds."""
    return median(a / b for a, b in zip(records, others))


def kilobytes(key):
    """key: "VmRSS", the memory of this process, or "VmHWM", its peak (Linux)."""
    return int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_megabytes(function, device):
    """The most memory that a call needs, on top of what was in use before it. On a CPU (Linux) the process must be
    new: memory that an earlier call used and gave back would not count again."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")           # forgets the peak so far
    before = kilobytes("VmRSS")
    function()
    return (kilobytes("VmHWM") - before) * 1.024e-3


def in_fresh_process(*arguments):
    """Start this script again with these arguments -> the number that it prints, or None if it fails."""
    done = subprocess.run([sys.executable, sys.argv[0], *map(str, arguments)], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else None


def text(x):
    """Numbers get three digits, None becomes a dash."""
    return "-" if x is None else x if isinstance(x, str) else f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def within(seconds, command, env, log):
    """Run a program that has to end after so many seconds; what it says is added to the file `log` -> what went wrong,
    or None. What it has started ends with it."""
    with open(log, "a") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
    try:
        if child.wait(seconds):
            return f"code {child.returncode}: {''.join(log.read_text().strip().splitlines()[-1:])}"
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    finally:                                                # torchrun must be asked, to end its own processes
        for number in signal.SIGTERM, signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(child.pid, number)
                child.wait(5)


def table(head, rows):
    """Print the rows."""
    rows = [list(map(text, row)) for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))))
    print(flush=True)


def markdown(rows):
    """Rows of gpu.py as a table in Markdown, and those without `of` as a list below it. **!** marks what is not ok."""
    mark = {True: "", False: " **!**"}
    cells = {(row["of"], row["under"]): row["cell"] + mark[row["ok"]] for row in rows if "of" in row}
    names, columns = (list(dict.fromkeys(of)) for of in zip(*cells)) if cells else ((), ())
    lines = [["", *columns], ["---"] * (1 + len(columns)),
             *([name, *(cells.get((name, column), "") for column in columns)] for name in names)] if cells else []
    notes = ["- " + ", ".join(f"{k}: {v if isinstance(v, list) else text(v)}" for k, v in row.items() if k != "ok")
             + mark[row.get("ok", True)] for row in rows if "of" not in row]
    lines = [f"| {' | '.join(line)} |" for line in lines] + [""] * bool(lines) + notes
    return "".join(f"{line}\n" for line in lines)
