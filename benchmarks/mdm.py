"""Which loss, and which order of training, for the same multiply-adds? Figures 4 and 8 of MDM, at toy size.

    python benchmarks/mdm.py                        three ways x three seeds; what is done is not done again
    python benchmarks/mdm.py --seeds 1 --steps 600  one seed, twice the training

Text to image on the drawn shapes at {16, 32}. All three ways train the same network, mdm tiny:
    finest         the loss of 32 px alone (the paper's "simple DM"); the network sees 32 px alone
    all            the losses of both resolutions
    progressive    half of the multiply-adds at {16}, half at {16, 32}; each half with a warm-up of 50 steps
                   and a cosine decay of its own
A small classifier, trained here on real shapes, tells whether a picture shows the shape and the colour that
its caption asks for; the Frechet distance is between its features of samples and of real pictures.
"""
import argparse
import csv
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import checkpoint
import sample
import train

SIZES = 16, 32


class Judge(nn.Module):
    """(B, 3, 32, 32) -> features (B, 64), logits of 8 shapes (B, 8) and of 6 colours (B, 6)."""

    def __init__(self):
        super().__init__()
        layers, C = [], 3
        for C_out in (16, 32, 64):
            layers += [nn.Conv2d(C, C_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            C = C_out
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU())
        self.shape, self.colour = nn.Linear(64, len(data.SHAPES)), nn.Linear(64, len(data.COLOURS))

    def forward(self, x):
        f = self.features(x)
        return f, self.shape(f), self.colour(f)


def truth(captions):
    """"a big blue star" -> numbers of shape and colour, each (B,)."""
    words = [caption.split() for caption in captions]
    return (torch.tensor([list(data.SHAPES).index(w[3]) for w in words]),
            torch.tensor([list(data.COLOURS).index(w[2]) for w in words]))


def trained_judge(path, shapes):
    torch.manual_seed(0)
    judge = Judge()
    if path.exists():
        judge.load_state_dict(torch.load(path, weights_only=True))
        return judge.eval()
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    for indices in data.batch_order(len(shapes), 0, 64, 0, 1500, 0, 64):
        batch = shapes[indices]
        shape, colour = truth(batch["caption"])
        x = batch["x"] / 127.5 - 1
        _, a, b = judge(x + 0.1 * torch.randn_like(x))          # so that faint noise does not decide
        loss = F.cross_entropy(a, shape) + F.cross_entropy(b, colour)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(judge.state_dict(), path)
    return judge.eval()


def frechet(a, b):
    """Distance between two sets of features (N, d), taken as normal distributions."""
    a, b = a.double(), b.double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root).item()


@torch.no_grad()
def scores(judge, x, captions, real):
    f, a, b = judge(x)
    shape, colour = truth(captions)
    right = (a.argmax(1) == shape) & (b.argmax(1) == colour)
    return right.float().mean().item(), frechet(f, real)


def minutes_of(log):
    """Of training, from its rate in images/s."""
    with open(log, newline="") as f:
        rows = [(int(row["images"]), float(row["images_per_s"])) for row in csv.DictReader(f)]
    return sum((n - before) / rate for (before, _), (n, rate) in zip([(0, 1), *rows], rows)) / 60


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=500,
                   help="at {16, 32}; progressive training has the same multiply-adds")
    p.add_argument("--results-dir", default="results/ablation-mdm")
    args = p.parse_args()
    folder = Path(args.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    judge = trained_judge(folder / "judge.pt", data.load("shapes"))
    images = data.load("shapes", split="test")[range(2048 + 192)]
    x, captions = images["x"] / 127.5 - 1, images["caption"]
    with torch.no_grad():
        real = torch.cat([judge(part)[0] for part in x[:2048].split(256)])
    own, floor = scores(judge, x[2048:], captions[2048:], real)
    print(f"the judge recognises {own:.1%} of real test pictures; distance of 192 to 2048 of them {floor:.3g}")

    mdm = checkpoint.load_paper("mdm")
    cost = {s: mdm.build("tiny", (3, s, s), text="bytes")[0].macs() for s in SIZES}
    plans = {"finest": [(32, args.steps, ["--set", "weights=finest"])], "all": [(32, args.steps, [])],
             "progressive": [(s, round(args.steps / 2 * cost[32] / cost[s]), []) for s in SIZES]}
    table = folder / f"scores-{args.steps}.csv"
    done = {}
    if table.exists():
        with open(table, newline="") as f:
            done = {(row[0], int(row[1])): [float(v) for v in row[2:]] for row in csv.reader(f)}
    for seed in args.seeds:
        for way, stages in plans.items():
            if (way, seed) in done:
                continue
            previous, minutes = None, 0
            for size, steps, flags in stages:
                name = f"{way}-{args.steps}-{seed}-{size}"
                train.main(["--model", "mdm", "--data", "shapes", "--cond", "text", "--image-size", str(size),
                            "--max-steps", str(steps), "--seed", str(seed), "--sample-every", "0",
                            "--warmup-steps", "50", "--results-dir", str(folder), "--name", name, *flags,
                            *(["--init-inner", str(folder / previous)] if previous else [])])
                if checkpoint.read(folder / name / "latest.pt")["step"] < steps:
                    sys.exit("stopped; the same command goes on")
                previous = name
                minutes += minutes_of(folder / name / "log.csv")
            model, diffusion, _ = checkpoint.load_run(folder / previous / "latest.pt")
            text, mask = data.text_encoder("bytes")(captions[:192])             # every caption twice
            drawn = sample.generate(model, diffusion, (3, 32, 32), torch.arange(192),
                                    {"text": text, "text_mask": mask}, 64, "cpu", sampler="ddpm",
                                    steps="25")
            done[way, seed] = [*scores(judge, drawn, captions[:192], real), minutes]
            with open(table, "a", newline="") as f:
                csv.writer(f).writerow([way, seed, *(f"{v:.5g}" for v in done[way, seed])])

    print(f"\n{args.steps} steps of 32 pictures at {{16, 32}}, or as many multiply-adds; 192 samples "
          f"without guidance, 25 steps\nof DDPM; the median of the seeds (lowest to highest)\n"
          f"way          seeds  shape and colour right    Frechet distance        minutes")
    for way in plans:
        columns = list(zip(*(v for (w, _), v in sorted(done.items()) if w == way)))
        if columns:
            right, distance, minutes = ((statistics.median(c), min(c), max(c)) for c in columns)
            print(f"{way:12s} {len(columns[0]):5d}  " + "{:.0%} ({:.0%} to {:.0%})".format(*right).ljust(26)
                  + "{:.3g} ({:.3g} to {:.3g})".format(*distance).ljust(24) + f"{minutes[0]:.1f}")


if __name__ == "__main__":
    main()
