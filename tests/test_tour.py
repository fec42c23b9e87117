"""examples/tour.ipynb: what is committed is whole, and it runs. To write its outputs anew:

    jupyter nbconvert --to notebook --execute --inplace examples/tour.ipynb
"""
import json
import re
from pathlib import Path

import pytest

TOUR = Path(__file__).resolve().parent.parent / "examples/tour.ipynb"


def text(cell):
    """What a cell printed."""
    return "".join("".join(out.get("text", "")) for out in cell.get("outputs", []))


def code(tour):
    return {cell["id"]: cell for cell in tour["cells"] if cell["cell_type"] == "code"}


def test_what_is_committed():
    """It was run from top to bottom, without errors or warnings, and shows all its pictures."""
    tour = json.loads(TOUR.read_text("utf8"))
    assert tour["nbformat"] == 4 and TOUR.stat().st_size <= 1.5e6
    cells = code(tour)
    assert [cell["execution_count"] for cell in cells.values()] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells.values() for out in cell["outputs"]]
    assert not [out for out in outputs if out["output_type"] == "error" or out.get("name") == "stderr"]
    for paper in ("dis", "diffussm", "mdm", "cunet"):
        assert "difference" in text(cells[f"{paper}-fast"])
        for what in ("draws", "inside"):
            assert "image/png" in cells[f"{paper}-{what}"]["outputs"][-1]["data"], (paper, what)
    said = "".join("".join(cell["source"]) + text(cell) for cell in tour["cells"])
    assert "threads.watch()" in said                        # otherwise a cell may take minutes beside a busy program
    assert not re.search(r"/(home|root|tmp|Users|usr|opt|mnt)/|[A-Z]:\\|site-packages", said)
    for link in re.findall(r"\]\(([^)#]+)", said):
        assert link.startswith("http") or (TOUR.parent / link).exists(), link


def test_it_runs():
    """In its folder, as Jupyter starts it, with a short training and few steps. Every comparison in it is checked."""
    for package in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package)
    import nbclient
    import nbformat
    there = code(json.loads(TOUR.read_text("utf8")))
    tour = nbformat.read(TOUR, 4)
    nbformat.validate(tour)
    cells = code(tour)
    cells["parameters"]["source"] = "TRAIN_STEPS, DRAW_STEPS = 2, '2'"
    nbclient.NotebookClient(tour, timeout=600, coalesce_streams=True,
                            resources={"metadata": {"path": TOUR.parent}}).execute()
    for name in ("dis-small", "mdm-small"):                 # what is committed is this code's output
        assert text(cells[name]) == text(there[name]) != ""
