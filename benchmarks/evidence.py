"""Makes the evidence behind docs/results.md: runs train.py for each study, and scores the samples with judge.py.

    python benchmarks/evidence.py                        all studies on MNIST
    python benchmarks/evidence.py minutes ode            some of them, by name
    python benchmarks/evidence.py colour --data shapes
    python benchmarks/evidence.py --missing              only what assets/evidence does not have yet
    python benchmarks/evidence.py --speed                how fast the four models train, while nothing else runs

A study has arms: ways of training that differ in one thing. Each arm is trained with every seed, on one core; --jobs
says how many runs go on at a time. A finished run is not done again, and an interrupted run goes on. A run lies in
--results-dir with its scores in a .csv beside it; delete both to do it again. The scores of a study are gathered in
assets/evidence/<data>-<study>.csv. benchmarks/figures.py makes tables and figures of them.
"""
import csv
import io
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "assets"
sys.path[:0] = [str(HERE.parent), str(HERE)]
import judge as judges
import sample
import train
from diffusion import UserError, fold, normal
from support import checkpoint, cli, cost, datasets, denoise
from support.pictures import to_uint8

# --- what is studied ----------------------------------------------------------------------------

DIS, DIFFUSSM, MDM, CUNET = (["--model", m] for m in ("dis", "diffussm", "mdm", "cunet"))
MINI = ["--preset", "mini"]                             # about a million parameters
UNET = [*CUNET, "--preset", "unet-mini"]                # what cU-Net is compared with
STEADY = ["--lr-schedule", "constant"]                  # for runs that go on after they are judged
HALF = ["--image-size", "half"]

# How samples are drawn for the judge. Never compare distances of 1,000 samples with distances of 500.
DRAW = dict(sampler="ddim", steps=50, cfg=1.0, n=1000)
QUICK = DRAW | dict(steps=25, n=500)


class Study:
    """arms     {name: [(flags of train.py, steps), ..]}: one stage after another. Each stage takes over the network of
             the stage before (--init-inner). `steps` is a list: the last stage is judged after each of them.
             Or {name: a file of weights in assets}: they are judged as they are, and a seed is only for the samples
    draws    the ways to draw samples for the judge
    noise    the ratios of noise to signal at which the error of x_0 is measured, too
    denoise  the steps from which test images are denoised, too"""

    def __init__(self, what, arms, seeds=(0, 1, 2), draws=[QUICK], noise=(), denoise=()):
        self.what, self.arms, self.seeds = what, arms, seeds
        self.draws, self.noise, self.denoise = draws, noise, denoise


LEVELS = 0.1, 0.3, 1, 3, 10
FOUR = {"DiS": DIS + MINI, "DiffuSSM": DIFFUSSM + MINI, "MDM": MDM + MINI, "cU-Net": CUNET + MINI}
HOUR = {"DiS": 13500, "DiffuSSM": 4400, "MDM": 18000, "cU-Net": 15500}              # steps on MNIST
TEN = {"DiS": 1600, "DiffuSSM": 320, "MDM": 800, "cU-Net": 800}                     # ten minutes, 32 x 32
STUDIES = {
    "minutes": Study("Equal time, about an hour of one core", {
        name: [(FOUR[name], [HOUR[name]])] for name in FOUR},
        (0,), [DRAW, DRAW | dict(cfg=2.0)], noise=LEVELS),
    "steps": Study("Equal steps", {name: [(FOUR[name], [500])] for name in FOUR}, (0,), noise=LEVELS),
    "colour": Study("Equal time, ten minutes of one core, 32 x 32 in colour", {
        name: [(FOUR[name], [TEN[name]])] for name in FOUR}, (0,), noise=LEVELS),
    "hourglass": Study("Hourglass or patches? DiffuSSM, Figure 6", {
        "M = 2": [([*DIFFUSSM, *STEADY, "--set", "patch=1", "ratio=2", "t_normal=None"], [400])],
        "P = 2": [([*DIFFUSSM, *STEADY, "--set", "patch=2", "ratio=1", "t_normal=None"], [400, 1000])]}),
    "dis": Study("Long skips, time, patches: ablations of DiS", {
        "concat, adaln, patch 7": [(DIS, [1200])],
        "skip=add": [([*DIS, "--set", "skip=add"], [1200])],
        "skip=none": [([*DIS, "--set", "skip=none"], [1200])],
        "time=token": [([*DIS, "--set", "time=token"], [1200])],
        "patch=4": [([*DIS, "--set", "patch=4"], [1200])],
        "patch=14": [([*DIS, "--set", "patch=14"], [1200])]}),
    "losses": Study("Which loss, which order? MDM, Figures 4 and 8", {
        "finest": [([*MDM, *MINI, "--set", "weights=finest"], [1000])],
        "all": [([*MDM, *MINI], [1000])],
        "progressive": [([*MDM, *MINI, *HALF], [1000]), ([*MDM, *MINI], [500])]}),
    "ode": Study("cU-Net or U-Net? Tables 1 to 3", {
        "cU-Net": [([*CUNET, *MINI, "--set", "nf=4"], [500])],
        "U-Net, as wide": [(UNET, [500])],
        "U-Net, as large": [([*UNET, "--set", "dim=8"], [500])]},
        draws=[QUICK | dict(steps=k) for k in (2, 5, 10, 25)],
        denoise=(50, 150)),
    "samplers": Study("How many steps of which sampler?", {"DiS": "dis-mnist.pt", "MDM": "mdm-mnist.pt"},
                      draws=[QUICK | dict(sampler=s, steps=k) for s in ("ddim", "ddpm")
                             for k in (5, 10, 25, 50, 100)]),
    "guidance": Study("How much guidance?", {"DiS": "dis-mnist.pt", "MDM": "mdm-mnist.pt"},
                      draws=[QUICK | dict(cfg=w) for w in (1, 1.5, 2, 3, 4, 6)]),
}


# --- one run --------------------------------------------------------------------------------------

FIELDS = ["arm", "seed", "step", "images", "minutes", "images_per_s", "parameters", "macs", "predict",
          "schedule", "made_of", "sampler", "steps", "cfg", "n",
          "recognised", "distance", "x_real", "precision", "recall", "seconds",
          *(f"error_{ratio}" for ratio in LEVELS), "from_step", "metric", "noisy", "one_step", "best",
          "after", "best_each", "after_each"]


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
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: v if isinstance(v, str) else int(v) if v == int(v) else f"{v:.5g}"
                      for k, v in row.items()} for row in rows)
    checkpoint.replace(path, lambda f: f.write(text.getvalue().encode()))


def done_in(log):
    """A run's log.csv -> minutes of training, images seen. The minutes are computed from the median speed of the
    log, since now and then a machine has other work."""
    rows = read_rows(log)
    images = rows[-1]["images"]
    return images / statistics.median(row["images_per_s"] for row in rows) / 60, images


@torch.no_grad()
def errors_by_noise(model, diffusion, test, ratios, n=1000):
    """-> {"error_<ratio>": mean squared error of the network's estimate of x_0}.

    n test images get noise until sigma / alpha is the ratio. So all networks are on one scale, whatever they predict
    and whatever their schedule is. For MDM it is the error at the finest resolution. The network also sees the coarse
    pictures, with noise of their own, and they tell it a little more.
    """
    n = min(n, len(test))
    batch, found = test[range(n)], {}
    levels = getattr(diffusion, "levels", [diffusion])
    for ratio in ratios:
        tables, total = levels[-1].tables, 0.0
        t = (tables["noise"] / tables["signal"] - ratio).abs().argmin()
        for rows in torch.arange(n).split(100):
            x0, y, at = batch["x"][rows] / 127.5 - 1, batch["y"][rows], t.expand(len(rows))
            noise = normal(fold(rows, 1), diffusion.noise_shape(test.shape))
            if hasattr(diffusion, "levels"):
                x = [functional.adaptive_avg_pool2d(x0, s[1:]) for s in diffusion.shapes]      # [(B, *shape)]
                e = diffusion.unpack(noise[:, :-1])
                z = diffusion.visible([d.q_sample(*of) for d, *of in zip(levels, x, [at] * len(x), e)])
                x_t, out = z[-1], model(z, diffusion.model_t(at), y=y)[-1]
            else:
                x_t = diffusion.q_sample(x0, at, noise)
                out = model(x_t, diffusion.model_t(at), y=y)
            belief, _ = levels[-1].predict_x0_eps(out, x_t, at)
            total += (belief - x0).square().flatten(1).mean(1).sum().item()
        found[f"error_{ratio}"] = total / n
    return found


def judged(judge, model, diffusion, trained, seed, how):
    """Draw samples, equally many of each class -> what the judge says of them, and how many seconds drawing took."""
    numbers, began = torch.arange(how["n"]), time.perf_counter()
    y = numbers % trained["num_classes"]
    images = sample.generate(model, diffusion, tuple(trained["shape"]), 10**6 * (seed + 1) + numbers,
                             {"y": y}, 100, "cpu", sampler=how["sampler"], steps=str(how["steps"]),
                             cfg_scale=how["cfg"], progress=False)
    seconds = time.perf_counter() - began
    images = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)                     # (N, C, H, W)
    return how | judge(images, y) | {"seconds": seconds}


def denoised(model, diffusion, test, T, n=100):
    """Add noise up to step T to n test images, and let DDPM remove it -> a row for PSNR and one for SSIM. `best` is the
    score of all images after the same number of steps, `best_each` that of each after its own best number."""
    metrics = {"psnr": denoise.psnr, "ssim": denoise.ssim}
    scores, seconds, _ = denoise.denoise(
        model, diffusion, test[range(n)]["x"] / 127.5 - 1, torch.arange(n), None, T, str(T + 1), metrics, 100,
        torch.device("cpu"), sampler="ddpm")
    for metric in metrics:
        _, (best_each, after_each, _), (best, after, took) = denoise.best_steps(scores, seconds, metric)
        yield {"n": n, "from_step": T, "metric": metric, "noisy": scores[metric, "noisy"].mean().item(),
               "one_step": scores[metric, "one step"].mean().item(), "best": best, "after": after, "seconds": took,
               "best_each": best_each, "after_each": after_each}


def made_of(args, name, arm, judge_path):
    """A checksum of everything that decides an arm's scores: flags, presets, weights, the classifier."""
    stages = STUDIES[name].arms[arm]
    if isinstance(stages, str):
        parts = [checkpoint.sums(ASSETS / stages)]
    else:
        parts = [stages, args.data]
        for flags, _ in stages:
            known = train.parse(["8" if f == "half" else f for f in flags])
            parts.append(checkpoint.load_paper(known.model).CONFIGS[known.preset])
    return zlib.crc32(repr([parts, checkpoint.sums(judge_path)]).encode())


def missing(study, arm, rows):
    """What has no row yet -> {step: [how to draw, or what to denoise]}. Step None: the weights in assets."""
    stages, todo = study.arms[arm], {}
    steps = [None] if isinstance(stages, str) else stages[-1][1]
    for step in steps:
        wanted = study.draws + [{"from_step": T, "metric": "ssim"}
                                for T in study.denoise * (step == steps[-1])]
        here = [row for row in rows if step in (None, row["step"])]
        if wanted := [how for how in wanted if not any(how.items() <= row.items() for row in here)]:
            todo[step] = wanted
    return todo


def do_run(args, name, arm, seed):
    """Train the stages of an arm with one seed, judge them, and write the scores down. Scores that are there already
    are not made again."""
    study, path = STUDIES[name], file_of(args, name, arm, seed)
    judge_path, stages = judges.path_of(args.data, None, args.results_dir), study.arms[arm]
    made = made_of(args, name, arm, judge_path)
    rows = rows_of(args, name, arm, seed, judge_path)
    todo = missing(study, arm, rows)
    if not todo:
        return
    judge = judges.Judge(args.data, args.data_dir, cache=args.results_dir)
    test = datasets.load(args.data, args.data_dir, split="test")

    def note(weights, minutes, images, wanted):
        """Judge these weights. wanted: a list of ways to draw, or of steps to denoise from; one line each."""
        model, diffusion, trained = checkpoint.load_run(weights)
        if trained["data"] != args.data:
            raise UserError(f"{weights} was trained on {trained['data']}: pass --data {trained['data']}")
        config = checkpoint.load_paper(trained["model"]).CONFIGS[trained["preset"]] | trained["set"]
        about = {"arm": arm, "seed": seed, "step": trained["step"], "images": images, "minutes": minutes,
                 "parameters": sum(p.numel() for p in model.parameters()), "macs": cost.multiply_adds(
                     model, diffusion, cost.blank_batch(diffusion, trained["shape"], 1, trained["num_classes"])),
                 "predict": config["predict"], "schedule": config["schedule"], "made_of": made,
                 **errors_by_noise(model, diffusion, test, study.noise)}
        for how in wanted:
            new = (denoised(model, diffusion, test, how["from_step"]) if "from_step" in how else
                   [judged(judge, model, diffusion, trained, seed, how)])
            rows.extend(about | row for row in new)
            write_rows(path, rows)

    if isinstance(stages, str):
        return note(ASSETS / stages, 0.0, 0, todo[None])
    minutes, images, begin = 0.0, 0, []                     # begin: the flags to start from the stage before
    for number, (flags, steps) in enumerate(stages, start=1):
        final = number == len(stages)
        run = path.with_suffix("" if final else f".stage{number}")
        for step in steps if not final else todo:
            train.main(["--global-batch-size", "32", "--lr", "2e-3", *sized(flags, test), *begin, "--data", args.data,
                        "--seed", str(seed), "--max-steps", str(step),
                        *(["--data-dir", args.data_dir] if args.data_dir else []),
                        "--sample-every", "0", "--results-dir", str(run.parent), "--name", run.name])
            if checkpoint.read(run / "latest.pt")["step"] < step:
                sys.exit("stopped; the same command goes on")
            took, seen = done_in(run / "log.csv")
            if final:
                note(run / "latest.pt", minutes + took, images + seen, todo[step])
        minutes, images, begin = minutes + took, images + seen, ["--init-inner", str(run)]


def sized(flags, dataset):
    """The flags, with a number in place of "half": half the size of the pictures."""
    return [str(dataset.shape[-1] // 2) if f == "half" else f for f in flags]


# --- all runs -------------------------------------------------------------------------------------

def file_of(args, name, arm, seed):
    """Where a run's scores are kept. The run itself lies beside."""
    arm = "".join(c if c.isalnum() else "-" for c in arm.lower())
    return Path(args.results_dir) / f"{args.data}-{name}-{arm}-{seed}.csv"


def rows_of(args, name, arm, seed, judge_path, gathered=False):
    """The rows of a run that are still valid: its own, or those gathered before, perhaps on another machine."""
    path = args.out / f"{args.data}-{name}.csv" if gathered else file_of(args, name, arm, seed)
    return [row for row in read_rows(path) if (row["arm"], row["seed"]) == (arm, seed)
            and row["made_of"] == made_of(args, name, arm, judge_path)]


def gather(args, name, judge_path):
    """Write all scores that a study has so far into one file. If a run was not done here, its scores in that file
    stay."""
    rows = []
    for arm in STUDIES[name].arms:
        for seed in STUDIES[name].seeds:
            run = args, name, arm, seed, judge_path
            rows += rows_of(*run) or rows_of(*run, gathered=True)
    if rows:
        args.out.mkdir(parents=True, exist_ok=True)
        write_rows(args.out / f"{args.data}-{name}.csv", rows)


def judge_itself(args):
    """Judge cases with known answers; the scores go beside those of the studies. -> the path of the judge's weights"""
    judge = judges.Judge(args.data, args.data_dir, cache=args.results_dir)
    path, about = args.out / f"{args.data}-judge.csv", {"made_of": checkpoint.sums(judge.path)}
    if not any(about.items() <= row.items() for row in read_rows(path)):
        args.out.mkdir(parents=True, exist_ok=True)
        rows = [{"arm": name} | about | judge(images, labels)
                for name, images, labels in judges.known_cases(judge, DRAW["n"])]
        write_rows(path, [{"arm": "accuracy"} | about | {"recognised": judge.accuracy,
                                                         "distance": judge.half_distance}, *rows])
    return judge.path


def speed(args, turns=3):
    """Measure how many images/s the four models train, on one core and taking turns. Write it beside the studies."""
    torch.set_num_threads(1)                                # like the runs of the studies
    rates = {arm: [] for arm in FOUR}
    for arm, flags in [*FOUR.items()] * turns:
        with tempfile.TemporaryDirectory() as folder:
            train.main([*flags, "--data", args.data, *["--data-dir", args.data_dir] * bool(args.data_dir),
                        "--max-steps", "30", "--log-every", "5", "--sample-every", "0",
                        "--results-dir", folder, "--name", "run"])
            rates[arm] += [row["images_per_s"] for row in read_rows(Path(folder) / "run/log.csv")[1:]]
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows(args.out / f"{args.data}-speed.csv", [
        {"arm": arm, "images_per_s": statistics.median(rate)} for arm, rate in rates.items()])


@cli.told_plainly()
def main(argv=None):
    p = cli.Parser(__doc__)
    p.add_argument("studies", nargs="*", metavar="STUDY", help=f"any of {', '.join(STUDIES)} (default: all)")
    p.add_argument("--data", default="mnist", help="what to train on")
    p.add_argument("--data-dir", help="as in train.py")
    p.add_argument("--results-dir", default="results/evidence", help="where each run has its folder")
    p.add_argument("--out", type=Path, default=ASSETS / "evidence", help="where scores are gathered")
    p.add_argument("--jobs", type=cli.number(int, 1), default=os.cpu_count(), help="runs at a time")
    p.add_argument("--missing", action="store_true", help="only what --out does not have yet")
    p.add_argument("--speed", action="store_true", help="measure how fast the four models of `minutes` train")
    p.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help="only this run of a study, in this process")
    args = p.parse_args(argv)
    if unknown := [s for s in args.studies if s not in STUDIES]:
        raise UserError(f"no study {unknown[0]!r}: choose {', '.join(STUDIES)}")
    if args.speed:
        return speed(args)
    if args.run:
        return do_run(args, args.studies[0], args.run[0], int(args.run[1]))
    os.makedirs(args.results_dir, exist_ok=True)
    checkpoint.hold(Path(args.results_dir))                 # for one evidence.py at a time
    judge_path = judge_itself(args)                         # trains the classifier, if need be, with all cores
    writing = threading.Lock()

    def start(name, arm, seed):
        """One run, in a process with one core: two runs that share cores would wait for each other."""
        log, began = file_of(args, name, arm, seed).with_suffix(".log"), time.perf_counter()
        with open(log, "a") as f:
            rc = subprocess.run(
                [sys.executable, __file__, name, "--run", arm, str(seed), "--data", args.data,
                 "--results-dir", args.results_dir, *["--data-dir", args.data_dir] * bool(args.data_dir)],
                stdout=f, stderr=f, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        with writing:
            gather(args, name, judge_path)
        took = f"{(time.perf_counter() - began) / 60:.1f} min"
        print(f"{name}: {arm}, seed {seed}: {f'stopped or failed, see {log}' if rc else took}", flush=True)
        return rc

    chosen = args.studies or [name for name in STUDIES if name != "colour"]
    runs = [(name, arm, seed) for name in chosen for seed in STUDIES[name].seeds
            for arm in STUDIES[name].arms
            if not args.missing or missing(
                STUDIES[name], arm, rows_of(args, name, arm, seed, judge_path, gathered=True))]
    with ThreadPoolExecutor(args.jobs) as pool:
        sys.exit(int(any(list(pool.map(lambda run: start(*run), runs)))))


if __name__ == "__main__":
    cli.run(main)
