"""Makes the evidence behind docs/results.md: runs train.py for each study, and scores the samples with judge.py.

    python benchmarks/evidence.py --speed                 first, while nothing else runs: how fast all arms train
    python benchmarks/evidence.py                         all studies on MNIST
    python benchmarks/evidence.py minutes mdm             some of them, by name
    python benchmarks/evidence.py minutes --data cifar10 --seeds 0
    python benchmarks/evidence.py --missing               only what assets/evidence does not have yet

A study has arms: ways of training that differ in one thing. All arms get the same time of one core, and the measured
speed tells how many steps that is. Each run is a process on one core; --jobs says how many go on at a time. A finished
run is not done again, and an interrupted run goes on. A run lies in --results-dir with its scores in a .csv beside it;
delete both to do it again. The scores of a study are gathered in assets/evidence/<data>-<study>.csv.
benchmarks/figures.py makes tables and figures of them.
"""
import csv
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import judge as judges          # before torch: it finds support/
import torch
import sample
import train
from diffusion import UserError, fold, normal
from support import checkpoint, cli, cost, datasets
from support.pictures import to_uint8

# --- what is studied ----------------------------------------------------------------------------

BATCH = 32                                              # images in a step, as by default in train.py
INNER = 0.2                                             # of the time is for the half size, if training begins with it
LEVELS = 0.1, 0.3, 1, 3, 10                             # sigma / alpha
CFG_BELOW = 0.7                                         # guidance acts below 0.7 T, whatever the preset says
DIS, DIFFUSSM, MDM, CUNET = (f"--model {m} --preset mini" for m in ("dis", "diffussm", "mdm", "cunet"))
UNET = "--model cunet --preset unet-mini"               # what cU-Net is compared with


@dataclass
class Study:
    what: str
    arms: dict                  # {name: [flags of train.py]}. Of two, the second network takes over the first
    minutes: float = 10         # of one core, for each run
    # After these shares of the minutes a run is judged. If there are several, the learning rate stays constant: so each
    # is what a shorter run would have reached (but the share of a first stage is INNER at the last place only).
    places: tuple = (1/16, 1/8, 1/4, 1/2, 1)
    n: int = 500                # samples are judged. Never compare the distances of 1,000 samples with those of 500
    steps: int = 10             # of DDIM, which draws them
    guidance: tuple = (1,)      # its scales
    noise: tuple = ()           # the ratios of noise to signal at which the error of x_0 is measured, too


STUDIES = {
    "minutes": Study("Equal time, an hour of one core", {
        "DiS": [DIS], "DiffuSSM": [DIFFUSSM], "MDM": [MDM], "cU-Net": [CUNET], "U-Net": [UNET]},
        60, (1,), 1000, 50, (1, 1.25), LEVELS),
    "dis-patches": Study("DiS: large or small patches?", {
        f"patches of {p} x {p}": [f"{DIS} --set patch={p}"] for p in (14, 7, 4, 2)}),
    "dis-parts": Study("DiS: do long skips help? Tokens, or adaptive norms?", {
        "skips joined, norms": [DIS],
        "skips added, norms": [f"{DIS} --set skip=add"],
        "no skips, norms": [f"{DIS} --set skip=none"],
        "skips joined, tokens": [f"{DIS} --set time=token"]}),
    "diffussm": Study("DiffuSSM: hourglass or patches?", {
        "hourglass, M = 2": [f"{DIFFUSSM} --set patch=1 ratio=2"],
        "patches, P = 2": [f"{DIFFUSSM} --set patch=2 ratio=1"]}),
    "mdm": Study("MDM: which loss, which order, how much noise?", {
        "loss of the finest": [f"{MDM} --set weights=finest"],
        "loss of all": [MDM],
        "half size first": [f"{MDM} --image-size 14", MDM],
        "power 2": [f"{MDM} --set power=2"]}),
    "cunet": Study("cU-Net: which parts help, and does a U-Net do better?", {
        "cU-Net": [CUNET],
        "first order": [f"{CUNET} --set dynamics=first"],
        "no attention": [f"{CUNET} --set attention=False"],
        "no residual": [f"{CUNET} --set residual=False"],
        "U-Net": [UNET]}),
}


def read_rows(path):
    """The lines of a .csv as dicts, with numbers as numbers. No file: no lines."""
    def value(text):
        try:
            return float(text)
        except ValueError:
            return text
    if not Path(path).exists():
        return []
    with open(path, newline="") as f:
        return [{k: value(v) for k, v in row.items() if v} for row in csv.DictReader(f)]


def write_rows(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: v if isinstance(v, str) else int(v) if v == int(v) else f"{v:.5g}"
                      for k, v in row.items()} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.replace(path, lambda f: f.write(text.getvalue().encode()))


# --- time and steps -------------------------------------------------------------------------------

def settings(data, flags):
    """A checksum of what decides how a stage trains: data, flags, preset, and the preset's own defaults for flags."""
    known = train.parse(flags.split())
    paper = checkpoint.load_paper(known.model)
    own = getattr(paper, "TRAINING", {}).get(known.preset)
    return zlib.crc32(repr([data, flags, paper.CONFIGS[known.preset], *[own] * bool(own)]).encode())


def common(args):
    return ["--data", args.data, *["--data-dir", args.data_dir] * bool(args.data_dir)]


def speed(args, names, turns=3):
    """Measure how many images/s each arm trains, on one core and taking turns. Write it beside the studies."""
    torch.set_num_threads(1)                                # like the runs of the studies
    path = args.out / f"{args.data}-speed.csv"
    known = {row["flags"]: row for row in read_rows(path)}
    arms = dict.fromkeys(flags for name in names for arm in STUDIES[name].arms.values() for flags in arm)
    rates = {flags: [] for flags in arms
             if not args.missing or known.get(flags, {}).get("made_of") != settings(args.data, flags)}
    for flags in [*rates] * turns:
        with tempfile.TemporaryDirectory() as folder:
            train.main([*flags.split(), *common(args), "--max-steps", "20", "--log-every", "5", "--sample-every", "0",
                        "--results-dir", folder, "--name", "run"])
            rates[flags] += [row["images_per_s"] for row in read_rows(Path(folder) / "run/log.csv")[1:]]
    for flags, rate in rates.items():
        known[flags] = {"flags": flags, "made_of": settings(args.data, flags), "images_per_s": statistics.median(rate)}
    write_rows(path, [*known.values()])


class Run:
    """An arm of a study, trained with one seed.

    path      its own scores; the run lies beside. `gathered`: the scores of the whole study
    stages    [(flags of train.py, {step: minutes of one core until there}), ..]; the last stage is judged
    made_of   a checksum of everything that decides the scores: data, flags, presets, steps, the classifier

    Raises UserError if the speed of the arm is not known."""

    def __init__(self, args, name, arm, seed):
        self.args, self.study, self.arm, self.seed = args, STUDIES[name], arm, seed
        word = re.sub(r"\W", "-", arm.lower())
        self.path = Path(args.results_dir) / f"{args.data}-{name}-{word}-{seed}.csv"
        self.gathered = args.out / f"{args.data}-{name}.csv"
        speeds = args.out / f"{args.data}-speed.csv"
        rates = {row["made_of"]: row["images_per_s"] for row in read_rows(speeds)}
        self.stages, parts, began = [], [], 0
        for flags in self.study.arms[arm]:
            made = settings(args.data, flags)
            if made not in rates:
                raise UserError(f"{speeds} does not tell how fast `train.py {flags}` is: first run `python "
                                f"benchmarks/evidence.py {name} --speed --missing --data {args.data}`, while nothing "
                                f"else runs")
            rate = 60 * self.study.minutes * rates[made] / BATCH                        # steps in all the minutes
            last = len(self.stages) == len(self.study.arms[arm]) - 1
            ends = [p for p in self.study.places if p > began] if last else [INNER]     # shares of the minutes
            steps = {max(1, int(float(f"{rate * (end - began):.3g}"))): end * self.study.minutes for end in ends}
            self.stages.append((flags, steps))
            parts.append((made, steps))
            began = INNER
        self.made_of = zlib.crc32(repr([parts, self.study.n, self.study.steps, CFG_BELOW,
                                        checkpoint.sums(judges.ASSETS / f"{args.data}-judge.pt")]).encode())

    def rows(self, path):
        """Those of its scores there that are still valid."""
        return [row for row in read_rows(path)
                if (row["arm"], row["seed"], row["made_of"]) == (self.arm, self.seed, self.made_of)]

    def missing(self, path):
        """-> {step: the scales of guidance whose scores are not there}."""
        done = {(row["step"], row["cfg"]) for row in self.rows(path)}
        todo = {step: [cfg for cfg in self.study.guidance if (step, cfg) not in done] for step in self.stages[-1][1]}
        return {step: scales for step, scales in todo.items() if scales}


# --- one run --------------------------------------------------------------------------------------

@torch.no_grad()
def errors_by_noise(model, diffusion, test, ratios, n=1000):
    """-> {"error_<ratio>": mean squared error of the network's estimate of x_0}.

    n test images get noise until sigma / alpha is the ratio. So all networks are on one scale, whatever they predict
    and whatever their schedule is. For MDM it is the error at the finest resolution. The network also sees the coarse
    pictures, with noise of their own, and they tell it more: with two resolutions the ratio is, in effect, 1.22 times
    smaller.
    """
    finest, found = getattr(diffusion, "levels", [diffusion])[-1], {}
    for ratio in ratios:
        t, total = (finest.tables["noise"] / finest.tables["signal"] - ratio).abs().argmin(), 0.0
        for rows in torch.arange(min(n, len(test))).split(100):
            batch, seen = test[rows], []
            x0, at = batch["x"] / 127.5 - 1, t.expand(len(rows))

            def network(z, t, **cond):
                seen.extend([z, model(z, t, **cond)])
                return seen[1]
            diffusion.loss(network, x0, at, normal(fold(rows, 1), diffusion.noise_shape(test.shape)), y=batch["y"])
            z, out = (v[-1] if isinstance(v, list) else v for v in seen)                    # (B, C, H, W)
            total += (finest.predict_x0_eps(out, z, at)[0] - x0).square().flatten(1).mean(1).sum().item()
        found[f"error_{ratio}"] = total / min(n, len(test))
    return found


def scores(run, weights, judge, test, scales):
    """Judge these weights with each scale of guidance -> a row for each."""
    model, diffusion, trained = checkpoint.load_run(weights)
    diffusion.cfg_below = CFG_BELOW
    batch = cost.blank_batch(diffusion, trained["shape"], 1, trained["num_classes"])
    about = {"parameters": sum(p.numel() for p in model.parameters()),
             "macs": cost.multiply_adds(model, diffusion, batch), **errors_by_noise(
                 model, diffusion, test, run.study.noise)}
    numbers = torch.arange(run.study.n)
    y = numbers % trained["num_classes"]                    # equally many of each class
    for cfg in scales:
        images = sample.generate(model, diffusion, tuple(trained["shape"]), 10**6 * (run.seed + 1) + numbers, {"y": y},
                                 100, "cpu", sampler="ddim", steps=str(run.study.steps), cfg_scale=cfg, progress=False)
        images = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)                     # (N, C, H, W)
        yield about | {"cfg": cfg} | judge(images, y)


def do_run(run):
    """Train the stages of a run, judge it at its places, and write the scores down. What is there is not done again."""
    args, rows, todo = run.args, run.rows(run.path), run.missing(run.path)
    if not todo:
        return
    judge, test = judges.Judge(args.data, args.data_dir), datasets.load(args.data, args.data_dir, split="test")
    begin, before = [], 0                                   # begin: the flags to start from the stage before
    for number, (flags, places) in enumerate(run.stages, start=1):
        final = number == len(run.stages)
        folder = run.path.with_suffix("" if final else f".stage{number}")
        for step in todo if final else places:
            last = folder / "latest.pt"
            if len(places) == 1 and last.exists() and (was := checkpoint.read(last)["args"]["max_steps"]) != step:
                raise UserError(f"{folder} is a run of {was} steps, and now {step} are equal time; its learning rate "
                                f"fell too soon or too late. Delete it and {run.path}")
            train.main([*flags.split(), *begin, *common(args), "--seed", str(run.seed), "--max-steps", str(step),
                        *["--lr-schedule", "constant"] * (len(run.study.places) > 1), "--sample-every", "0",
                        "--results-dir", str(folder.parent), "--name", folder.name])
            if checkpoint.read(last)["step"] < step:
                sys.exit("stopped; the same command goes on")
            if final:
                about = {"arm": run.arm, "seed": run.seed, "step": step, "images": BATCH * (before + step),
                         "minutes": places[step], "made_of": run.made_of}
                for row in scores(run, folder / "latest.pt", judge, test, todo[step]):
                    write_rows(run.path, rows := [*rows, about | row])
        begin, before = ["--init-inner", str(folder)], before + max(places)


# --- all runs -------------------------------------------------------------------------------------

def gather(args, name):
    """Write all scores that a study has so far into one file. If that file has more valid scores of a run than were
    made here, those stay."""
    path = args.out / f"{args.data}-{name}.csv"
    seeds = sorted({*args.seeds, *(row["seed"] for row in read_rows(path))})
    runs = [Run(args, name, arm, int(seed)) for arm in STUDIES[name].arms for seed in seeds]
    if rows := [row for run in runs for row in max(run.rows(run.path), run.rows(path), key=len)]:
        write_rows(path, rows)


def judge_itself(args):
    """Judge cases with known answers; the scores go beside those of the studies."""
    judge = judges.Judge(args.data, args.data_dir)
    path, about = args.out / f"{args.data}-judge.csv", {"made_of": checkpoint.sums(judge.path)}
    if not any(about.items() <= row.items() for row in read_rows(path)):
        write_rows(path, [{"arm": "accuracy", "recognised": judge.accuracy} | about,
                          *({"arm": name} | about | judge(x, y) for name, x, y in judges.known_cases(judge))])


@cli.told_plainly()
def main(argv=None):
    p = cli.Parser(__doc__)
    p.add_argument("studies", nargs="*", metavar="STUDY", help=f"any of {', '.join(STUDIES)} (default: all)")
    p.add_argument("--data", default="mnist", help="what to train on")
    p.add_argument("--data-dir", help="as in train.py")
    p.add_argument("--seeds", type=cli.number(int), nargs="+", default=[0, 1, 2], help="a run for each")
    p.add_argument("--results-dir", default="results/evidence", help="where each run has its folder")
    p.add_argument("--out", type=Path, default=judges.ASSETS / "evidence", help="where scores are gathered")
    p.add_argument("--jobs", type=cli.number(int, 1), default=os.cpu_count(), help="runs at a time")
    p.add_argument("--missing", action="store_true", help="only what --out does not have yet")
    p.add_argument("--speed", action="store_true", help="measure how fast the arms of the studies train")
    p.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help="only this run of a study, in this process")
    args = p.parse_args(argv)
    if unknown := [s for s in args.studies if s not in STUDIES]:
        raise UserError(f"no study {unknown[0]!r}: choose {', '.join(STUDIES)}")
    names = args.studies or [*STUDIES]
    if args.speed:
        return speed(args, names)
    if args.run:
        return do_run(Run(args, names[0], args.run[0], int(args.run[1])))
    os.makedirs(args.results_dir, exist_ok=True)
    checkpoint.hold(Path(args.results_dir))                 # for one evidence.py at a time
    judge_itself(args)                                      # trains the classifier, if need be, with all cores
    runs = [(name, run) for name in names for seed in args.seeds for arm in STUDIES[name].arms
            for run in [Run(args, name, arm, seed)] if not args.missing or run.missing(run.gathered)]
    writing = threading.Lock()

    def start(name, run):
        """One run, in a process with one core: two runs that share cores would wait for each other."""
        log, began = run.path.with_suffix(".log"), time.perf_counter()
        with open(log, "a") as f:
            rc = subprocess.run([sys.executable, __file__, name, "--run", run.arm, str(run.seed), *common(args),
                                 "--results-dir", args.results_dir, "--out", str(args.out)],
                                stdout=f, stderr=f, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        with writing:
            gather(args, name)
        took = f"{(time.perf_counter() - began) / 60:.1f} min"
        print(f"{name}: {run.arm}, seed {run.seed}: {f'stopped or failed, see {log}' if rc else took}", flush=True)
        return rc

    with ThreadPoolExecutor(args.jobs) as pool:
        sys.exit(int(any(list(pool.map(lambda run: start(*run), runs)))))


if __name__ == "__main__":
    cli.run(main)
