"""benchmarks/gpu.py, which waits for a GPU: what can be tried without one in a second or two. `bash benchmarks/gpu.sh
--rehearse` tries all of it."""
import json
import sys
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import torch

import train
from support.checkpoint import load_paper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import gpu  # noqa: E402

SMALL = {"dis": dict(width=16, depth=1, state=2), "mdm": dict(channels=(8, 8), outer=(), blocks=(1, 1), embedding=8)}


def arguments(small, out):
    return Namespace(small=small, cuda=not small, device=torch.device("cpu" if small else "cuda"), out=out,
                     data_dir=None, pick=lambda gpu, rehearsal: rehearsal if small else gpu)


@pytest.mark.parametrize("name", ["models", "scan", "s4d"])
def test_a_rehearsal(name, tmp_path, monkeypatch):
    """Some parts, as --rehearse does them, but in this process and with still smaller networks."""
    monkeypatch.setattr(gpu.steps, "CORES", list(SMALL))
    for model, options in SMALL.items():
        configs = load_paper(model).CONFIGS
        monkeypatch.setitem(configs, "tiny", configs["tiny"] | options)
    gpu.work(name, arguments(True, tmp_path))
    rows = [json.loads(row) for row in (tmp_path / "rows").read_text().splitlines()]
    assert rows and all(row.get("ok", True) for row in rows)


def test_what_only_a_gpu_runs(tmp_path, monkeypatch):
    """All parts with the sizes for a GPU, where all that is measured is replaced by functions that take the same
    arguments. Each network is built, without numbers; the flags are read."""
    ms, said = {"form": "", "": "", "forward ms": 1.0, "with backward ms": 2.0}, {}
    found = {gpu.steps: {"speed": {"images/s": 1.0, "GB": 2.0}, "errors": {"fp32": {"loss": 0.0}}, "waits": {"a:1": 0},
                         "train_for": {}, "planned": 1.0},
             gpu.scans: {"chosen": "fused", "errors": (0.0, 0.0), "last_row_error": None, "forms": {"definition": None},
                         "bound": [ms], "compare": [ms], "convolutions": [ms]},
             gpu.s4d: {"cases": [("", {}, [])], "compare": [ms]},
             gpu.memory: {"line": dict(preset="", precision="", estimate=1.0, measured=1.0)},
             torch.cuda: {"get_device_properties": mock.Mock(total_memory=8e10), "device_count": 2},
             gpu.processes: {"train": [1.0, 2.0]}, gpu.subprocess: {"run": mock.Mock(stdout="1 passed", returncode=0)}}
    for where, functions in found.items():
        for name, value in functions.items():
            said[where, name] = mock.create_autospec(getattr(where, name), return_value=value)
            monkeypatch.setattr(where, name, said[where, name])
    monkeypatch.setattr(gpu.gc, "collect", lambda: None)                # takes a tenth of a second
    for name in gpu.PARTS:
        gpu.work(name, arguments(False, tmp_path))
        rows = [json.loads(row) for row in (tmp_path / "rows").read_text().splitlines()]
        assert rows and all(row.get("ok", True) for row in rows), rows
    cases = {call.args[0] for name in ("speed", "errors") for call in said[gpu.steps, name].call_args_list}
    runs = [train.parse(call.args[0]) for call in said[gpu.steps, "waits"].call_args_list]
    assert train.parse(said[gpu.steps, "train_for"].call_args.args[1]).preset == "DiS-S/2"
    with torch.device("meta"):
        for model, preset, shape, _, *classes in cases:
            load_paper(model).build(preset, shape, *classes)
        for args in runs:
            load_paper(args.model).build(args.preset, (3, 32, 32), 10, **args.set)
    assert sum(seconds for seconds, _, _ in gpu.PARTS.values()) <= 460


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no groups of processes")
def test_parts_that_fail(tmp_path, monkeypatch, capsys):
    """One hangs, one ends with an error: what was measured is kept, and the next part begins."""
    (tmp_path / "part.py").write_text("""
import json, sys, time
row, name = {"of": "a", "under": "b", "cell": "1 / 2", "ok": False}, sys.argv[-1]
open(f"{sys.argv[sys.argv.index('--out') + 1]}/rows", "w").write(json.dumps(row))
if name == "hangs":
    time.sleep(60)
if name == "fails":
    sys.exit("a last line")
""")
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "part.py"))
    monkeypatch.setattr(gpu, "BEGUN", time.monotonic())
    monkeypatch.setattr(gpu, "PARTS", {"hangs": (0.5, "First", None), "fails": (20, "Second", None),
                                       "works": (1, "Third", None)})
    assert gpu.main(["--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [[row.get("error", row.get("cell")) for row in part["rows"]] for part in found.values()] == [
        ["1 / 2", "not done after 0 s"], ["1 / 2", "code 1: a last line"], ["1 / 2"]]
    page = (tmp_path / "gpu.md").read_text()
    assert "**Second**\n\n|  | b |\n| --- | --- |\n| a | 1 / 2 **!** |\n\n- error: code 1: a last line **!**\n" in page
    assert page in capsys.readouterr().out
