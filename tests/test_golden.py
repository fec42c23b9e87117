"""The training step in numbers. These tests use only the command line of train.py and the files of a run, so its
parts can lie in any file. A table holds the first steps of every paper. A model of two weights writes down what
it was given, and a test takes its steps again by hand. This file is that model: see `build`.

    python -m tests.test_golden         prints the table anew, after an intended change of numbers
"""
import contextlib
import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from diffusion import uniform

pytestmark = pytest.mark.usefixtures("counted_once")         # conftest.py
COLUMNS = ["loss", "loss_t0", "loss_t1", "loss_t2", "loss_t3", "loss_t4", "grad_norm", "lr"]
COMMON = ["--global-batch-size", 8, "--max-steps", 3, "--warmup-steps", 1, "--lr", 1e-3, "--log-every", 1,
          "--cond-dropout", 0.4, "--sample-every", 0, "--device", "cpu", "--name", "run"]
PAPERS = {"dis": ["--image-size", 8, "--hflip", "--set", "t_normal=None", "min_snr=5"],
          "diffussm": ["--image-size", 8, "--grad-clip", 0, "--set", "t_normal=None"],
          "mdm": ["--image-size", 16, "--hflip", "--cond", "text"],
          "cunet": ["--image-size", 8, "--set", "t_normal=None"]}
# A line for each step has COLUMNS, and nan where no t fell into a band. The last line has three norms of the output
# layer, which begins at 0 except in cU-Net: raw weights, averaged weights, their difference. Those of DiS and DiffuSSM
# were the same to 5 digits in torch 2.6 and 2.13, with and without AVX; MDM's and cU-Net's were made with torch 2.13.
GOLDEN = {
    "dis": """
        1.49583   2.6192    2.68655   1.32213   0.666638  0.652315  8.898     0.001
        1.49054   2.48288   2.08635   0.749125  nan       0.538447  10.67     0.001
        1.48639   2.08487   1.58417   nan       nan       0.442     9.869     0.0005
        0.102798  0.0932486 0.00968835""",
    "diffussm": """
        0.653159  0.52384   0.659959  0.729286  0.666638  0.652315  2.098     0.001
        0.599538  0.570194  0.655251  0.58692   nan       0.584653  2.268     0.001
        0.55628   0.581732  0.529622  nan       nan       0.558088  1.911     0.0005
        0.0660466 0.0598205 0.00629833""",
    "mdm": """
        0.679129  0.517604  0.692004  0.757848  0.689897  0.703883  4.85      0.001
        0.560263  0.557075  0.567693  0.546544  nan       0.592937  4.792     0.001
        0.404037  0.395254  0.371479  nan       nan       0.46605   3.971     0.0005
        0.0838276 0.0760895 0.00787329""",
    "cunet": """
        0.877841  0.596866  0.852422  0.995735  0.932467  0.927879  7.457     0.001
        0.908643  1.0707    0.963382  0.79423   nan       0.818282  14.38     0.001
        0.628273  0.646299  0.60474   nan       nan       0.636531  3.841     0.0005
        0.97467   0.974905  0.00114377""",
}


def run(folder, *flags, processes=1):
    """-> the lines of log.csv as floats (steps, columns), and what latest.pt holds."""
    flags = [str(f) for f in (*COMMON, "--results-dir", folder, *flags)]
    if processes == 1:
        train.main(flags)
    else:
        import ranks                            # here, since `python -m tests.test_golden` does not find it
        ranks.launch(folder.with_name("said"), processes, "train.py", *flags)
    with open(folder / "run" / "log.csv", newline="") as f:
        rows = [[float(row[c] or "nan") for c in COLUMNS] for row in csv.DictReader(f)]
    return rows, torch.load(folder / "run" / "latest.pt", weights_only=True)


def summary(rows, saved):
    raw, ema = (list(saved[part].values())[-2] for part in ("model", "ema"))
    return [*rows, [raw.norm().item(), ema.norm().item(), (raw - ema).norm().item()]]


def check(rows, saved, name):
    table = GOLDEN[name].strip().splitlines()
    for step, (line, found) in enumerate(zip(table, summary(rows, saved), strict=True), 1):
        expected = [float(number) for number in line.split()]
        assert found == pytest.approx(expected, rel=1e-3, nan_ok=True), step    # log.csv rounds to 4 digits
        assert found[:6] == pytest.approx(expected[:6], rel=1e-4, nan_ok=True), step


# --- the papers -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PAPERS)
def test_first_steps_of_every_paper(tmp_path, name):
    """Most wrong lines of code fail here, without saying why. Those in a paper's own loss or first weights fail only
    here. All gradients are above the limit of clipping; DiffuSSM has no limit."""
    check(*run(tmp_path, "--model", name, *PAPERS[name]), name)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_batch_in_parts_is_the_same_step(tmp_path, processes):
    """No other test fails if processes exchange gradients in the first part of a batch instead of the last."""
    _, whole = run(tmp_path / "whole", *PAPERS["dis"])
    rows, parts = run(tmp_path / "parts", *PAPERS["dis"], "--grad-accum", 2, processes=processes)
    check(rows, parts, "dis")
    for part in ("model", "ema"):
        torch.testing.assert_close(parts[part], whole[part], atol=2e-5, rtol=1e-4)


# --- two weights ------------------------------------------------------------------------------------------

def probe(folder, *flags):
    """run() with this file's model -> its results, and for each micro-batch a dict of what the model was given."""
    given = folder / "given"
    given.mkdir(parents=True)
    flags = ["--model", __file__, "--image-size", 8, "--set", f"given={given}", "--lr", 0.1, *flags]
    return *run(folder, *flags), [torch.load(p, weights_only=True) for p in sorted(given.iterdir())]


@pytest.mark.parametrize("clip, parts", [(0.3, 1), (0, 2)])
def test_every_step_by_hand(tmp_path, clip, parts):
    """Tells what is wrong if the warm-up begins at zero, the cosine ends above zero, a rate comes late, a gradient
    is not clipped, the average is taken before the step, or a line of the log keeps earlier bands."""
    rows, saved, given = probe(
        tmp_path, "--grad-clip", clip, "--grad-accum", parts, "--max-steps", 7, "--warmup-steps", 3,
        "--beta2", 0.9, "--weight-decay", 0.1, "--ema-decay", 0.3)
    rates = [0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.0853553, 0.05, 0.0146447]
    weight, norms = torch.nn.Parameter(torch.tensor(START)), []
    ema = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], betas=(0.9, 0.9), weight_decay=0.1)
    assert len(rows) == 7 and len(given) == 7 * parts
    for step, (row, rate) in enumerate(zip(rows, rates), 1):
        now = given[(step - 1) * parts:step * parts]
        t, slopes = (torch.cat(x) for x in zip(*((g["t"], slope(g["noise"])) for g in now)))    # (8,), (8, 2)
        loss, gradient = (slopes @ weight).detach(), slopes.mean(0)
        norms.append(gradient.norm().item())
        bands = [loss[t == band].mean().item() for band in range(5)]
        assert row == pytest.approx([loss.mean().item(), *bands, norms[-1], rate], rel=1e-3, abs=1e-5,
                                    nan_ok=True), step
        weight.grad = gradient * min(1, clip / norms[-1]) if clip else gradient
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        ema.lerp_(weight.detach(), 1 - min(0.3, (1 + step) / (10 + step)))
    assert min(norms) < 0.3 < max(norms)
    torch.testing.assert_close(saved["model"]["weight"][0], weight.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(saved["ema"]["weight"][0], ema, atol=1e-5, rtol=0)
    assert set(saved) == {"version", "model", "ema", "opt", "step", "images", "args"}
    assert saved["step"] == 7 and saved["images"] == 56


def test_what_the_model_is_given(tmp_path):
    """Tells what is wrong if pixels are not in [-1, 1], t is never T - 1, two draws come from one counter, pictures
    are mirrored upside down, or classes and captions are hidden too often, too rarely or never."""
    flags = ["--global-batch-size", 256, "--max-steps", 2, "--cond-dropout", 0.2]
    runs = [probe(tmp_path / str(i), *flags, *more)[2]
            for i, more in enumerate([[], ["--hflip"], ["--cond", "text"]])]
    plain, flipped, words = ({k: torch.cat([g[k] for g in given]) for k in given[0]} for given in runs)
    x0, t, noise, y, mirrored = plain["x0"], plain["t"], plain["noise"], plain["y"], flipped["x0"]
    assert -1 <= x0.min() < -0.8 and 0.5 < x0.max() <= 1
    assert set(t.tolist()) == {0, 1, 2, 3, 4} and t.float().mean() == pytest.approx(2, abs=0.2)
    assert noise.mean() == pytest.approx(0, abs=0.02) and noise.std() == pytest.approx(1, abs=0.02)
    assert set(y.tolist()) == {-1, *range(8)}
    hidden, flip = y == -1, (mirrored != x0).flatten(1).any(1)
    assert torch.equal(mirrored, torch.where(flip.view(-1, 1, 1, 1), x0.flip(3), x0))
    assert hidden.float().mean() == pytest.approx(0.2, abs=0.05)
    assert flip.float().mean() == pytest.approx(0.5, abs=0.07)
    assert torch.equal(words["text_mask"].any(1), ~hidden)
    draws = torch.stack([t.float(), hidden.float(), flip.float(), *noise.abs().flatten(1).T])
    assert torch.corrcoef(draws).triu(1)[:3].abs().max() < 0.25


def test_pictures_are_of_the_averaged_weights(tmp_path):
    """During training and at its end. No other test here looks at pictures. A picture shows the first weight."""
    _, last, _ = probe(tmp_path, "--max-steps", 2, "--sample-every", 1, "--ckpt-every", 1, "--lr", 0.3,
                       "--warmup-steps", 0, "--lr-schedule", "constant")
    first = torch.load(tmp_path / "run" / "checkpoints" / "0000001.pt", weights_only=True)
    for weights, picture in ((first, "samples/step_0000001.png"), (last, "samples.png")):
        grey = np.asarray(Image.open(tmp_path / "run" / picture))[-20, -20] / 127.5 - 1     # a pixel of the last one
        ema, raw = weights["ema"]["weight"][0, 0].item(), weights["model"]["weight"][0, 0].item()
        assert grey == pytest.approx(ema, abs=0.01) and abs(raw - ema) > 0.02


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, capsys):
    """The loss of this step is finite. No other test sees this: after one more step the loss would tell."""
    with pytest.raises(SystemExit) as stopped:
        probe(tmp_path, "--preset", "broken", "--max-steps", 1)
    assert stopped.value.code == 2 and "gradient is not finite at step 1" in capsys.readouterr().err
    assert not (tmp_path / "run" / "latest.pt").exists()


# --- the model --------------------------------------------------------------------------------------------

START = [0.5, -0.5]
CONFIGS = {"tiny": {"broken": False}, "broken": {"broken": True}}


def slope(noise):
    """The slope of each example's loss in the two weights: (B, C, H, W) -> (B, 2)."""
    return noise.flatten(1)[:, :2]


class Probe(torch.nn.Module):
    """Writes down what it is given, a file for each micro-batch. broken: its loss is finite, its gradient is not."""

    def __init__(self, given, broken):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([START]))         # (1, 2): a matrix, so it may decay
        self.given, self.broken = Path(given), broken

    def forward(self, **batch):
        torch.save(batch, self.given / f"{len(list(self.given.iterdir())):04d}.pt")
        nothing = (0 * self.weight[0, 0]).sqrt() if self.broken else 0
        return slope(batch["noise"]) @ self.weight[0] + nothing                                        # (B,)


class Diffusion:
    """A diffusion of five steps, one in each band of log.csv."""
    T = 5

    def noise_shape(self, shape):
        return shape

    def draw_t(self, seeds):
        return (uniform(seeds) * self.T).long()

    def loss(self, net, x0, t, noise, **cond):
        return {"loss": net(x0=x0, t=t, noise=noise, **cond)}

    def respaced(self, steps):
        assert int(steps) <= self.T             # grids and final pictures ask for no more
        return self

    def sample(self, model, shape, seeds, steps, **options):
        self.respaced(steps)
        return model.weight[0, 0].detach().expand(len(seeds), *shape)


def build(preset, shape, num_classes=0, text=0, **options):
    return Probe(**CONFIGS[preset], **options), Diffusion()


if __name__ == "__main__":
    for name, flags in PAPERS.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            table = summary(*run(Path(folder), "--model", name, *flags))
        lines = ["".join(f"{x:<10.{6 if i < 6 else 4}g}" for i, x in enumerate(row)) for row in table]
        print(f'    "{name}": """', *(f"        {line}".rstrip() for line in lines), sep="\n", end='""",\n')
