"""Tables (Markdown) and figures (PNG) of the studies in assets/evidence/*.csv.

    python benchmarks/figures.py                            print all tables
    python benchmarks/figures.py mnist-ode                  print those of one study
    python benchmarks/figures.py --into docs/results.md     write them into the page, see `put`

Figures lie beside the scores. They need `pip install matplotlib`; without it there are tables only.
"""
import re
import shlex
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from evidence import FOUR, LEVELS, STUDIES, read_rows
from support import checkpoint, cli
from diffusion import UserError

try:
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

COLOURS = ["#1f6fb4", "#d9701c", "#2f8f4e", "#b03060", "#6b5b95", "#7a7a7a"]
SHARE, DISTANCE = "recognised as the class asked for", "Frechet distance / that of real images"
LABELS = {"recognised": SHARE, "x_real": DISTANCE, "steps": "steps of the sampler", "cfg": "guidance scale"}


# --- tables ---------------------------------------------------------------------------------------

def spread(values, form):
    """The median; if there are several values, also the lowest and the highest."""
    values = sorted(values)
    middle = form(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({form(values[0])} to {form(values[-1])})"


def percent(x):
    return f"{100 * x:.1f}%"


def digits(x):
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def markdown(head, lines):
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [head, ["---"] * len(head), *lines])


def groups(rows, *keys):
    """-> {values of these keys: the rows that have them}, in the order in which they come."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row.get(k) for k in keys), []).append(row)
    return found


def cost_table(rows, speeds):
    """What each arm costs. speeds: {arm: images/s}, measured side by side; a row's own speed goes before. Other arms
    use their own run's minutes."""
    lines = []
    for (arm,), of in groups(rows, "arm").items():
        last = [r for r in of if r["step"] == max(r["step"] for r in of)]
        r, minutes = last[0], [r["minutes"] for r in last]
        if arm in speeds:
            minutes = [r["images"] / r.get("images_per_s", speeds[arm]) / 60]
        lines.append([arm, f"{r['parameters']:,.0f}", f"{r['macs'] / 1e6:.0f}M",
                      f"{r['predict']}, {r['schedule']}", f"{r['images']:,.0f}",
                      spread(minutes, digits), digits(r["images"] / 60 / statistics.median(minutes))])
    return markdown(["", "parameters", "multiply-adds", "predicts, schedule", "images seen",
                     "minutes of one core", "images/s"], lines)


def quality_table(rows):
    """What the judge says of each arm. A distance is divided by that of n real images, and the column's head names n.
    Distances with different n cannot be compared."""
    lines, real = [], " or ".join(f"{n:,.0f}" for n in sorted({r["n"] for r in rows}))
    keys = "arm", "step", "sampler", "steps", "cfg", "n"
    for (arm, step, sampler, steps, cfg, n), of in groups(rows, *keys).items():
        lines.append([arm, f"{step:,.0f}", f"{sampler.upper()} {steps:.0f}", f"{cfg:g}", f"{n:,.0f}", len(of),
                      spread([r["recognised"] for r in of], percent),
                      spread([r["x_real"] for r in of], digits),
                      spread([r["precision"] for r in of], "{:.2f}".format),
                      spread([r["recall"] for r in of], "{:.2f}".format)])
    return markdown(["", "steps", "sampler", "guidance", "samples", "runs", "recognised",
                     f"distance / {real} real", "precision", "recall"], lines)


def noise_table(rows):
    """The error of x_0 of each arm at each ratio of noise to signal."""
    lines = [[arm, *(spread({r[f"error_{ratio}"] for r in of}, digits) for ratio in LEVELS)]
             for (arm,), of in groups(rows, "arm").items()]
    return markdown(["squared error of x_0 at sigma / alpha =", *LEVELS], lines)


def denoising_table(rows):
    """PSNR and SSIM of each arm: of the noisy pictures, of the network's first estimate, and at the best step: at that
    of the mean, and (scores made before this was written down lack it) at each picture's own."""
    lines, each = [], all("best_each" in r for r in rows)
    columns = ["one_step", "best", "after", "seconds"] + ["best_each", "after_each"] * each
    for (metric, T, arm), of in sorted(groups(rows, "metric", "from_step", "arm").items()):
        lines.append([f"{metric.upper()} from step {T:.0f}", arm, digits(of[0]["noisy"]),
                      *(spread([r[k] for r in of], digits)
                        for k in columns)])
    return markdown(["", "", "noisy", "one step", "best", "after steps", "seconds",
                     *["each at its best", "after steps"] * each], lines)


# --- figures --------------------------------------------------------------------------------------

def plain(x, _):
    return f"{x:g}"


def share(x, _):
    return f"{100 * x:.3g}%"


def panels(n, title):
    figure, axes = pyplot.subplots(1, n, figsize=(4.6 * n, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axis in axes:
        axis.grid(True, axis="y", color="#dddddd", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def dots(rows, title):
    """The arms side by side: a dot for each seed, a bar at the median."""
    figure, axes = panels(2, title)
    arms = groups(rows, "arm")
    for axis, key, label in zip(axes, ("recognised", "x_real"), (SHARE, DISTANCE)):
        for i, (arm, of) in enumerate(arms.items()):
            values = [r[key] for r in of]
            axis.plot([i] * len(values), values, "o", color=COLOURS[i], alpha=0.7)
            axis.plot([i - 0.2, i + 0.2], [statistics.median(values)] * 2, color=COLOURS[i], linewidth=2)
        axis.set_xticks(range(len(arms)), [arm.replace(", ", "\n") for arm, in arms], fontsize=8,
                        rotation=20 if len(arms) > 3 else 0)
        axis.set_xlim(-0.6, len(arms) - 0.4)
        axis.set_ylabel(label, fontsize=9)
    axes[0].yaxis.set_major_formatter(share)
    axes[1].set_ylim(bottom=0)
    return figure


def curves(rows, title, x, y, split=("arm",), scale="log"):
    """A panel for each y, plotted over x. Lines are medians over the seeds, bands go from the lowest to the highest."""
    figure, axes = panels(len(y), title)
    for axis, key in zip(axes, y):
        for which, of in groups(rows, *split).items():
            at, points = zip(*sorted((at, g) for (at,), g in groups(of, x).items()))
            low, middle, high = zip(*((min(v), statistics.median(v), max(v)) for v in (
                [r[key] for r in g] for g in points)))
            colour = COLOURS[[*groups(rows, "arm")].index((which[0],)) % len(COLOURS)]
            style = "--" if "ddpm" in which else "-"
            axis.plot(at, middle, style, marker="o", markersize=3, color=colour, label=", ".join(which))
            axis.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
        axis.set_xscale(scale)
        axis.xaxis.set_major_formatter(plain)
        axis.set_xticks(sorted({r[x] for r in rows}))
        axis.minorticks_off()
        axis.set_xlabel(LABELS.get(x, x), fontsize=9)
        axis.set_ylabel(LABELS.get(key, key), fontsize=9)
        if key == "x_real":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(plain)
            axis.yaxis.set_minor_formatter(lambda v, _: f"{v:g}" if f"{v:g}"[0] in "235" else "")
            axis.tick_params(axis="y", which="minor", labelsize=7)
        else:
            axis.yaxis.set_major_formatter(share if key == "recognised" else plain)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def figure_of(name, study, rows):
    """The picture of a study, or None if its table says it all."""
    if name == "hourglass":
        rows = [r | {"arm": f"{r['arm']}, {r['step']:,.0f} steps"} for r in rows]
    if name in ("samplers", "ode"):
        return curves(rows, study.what, "steps", ("recognised", "x_real"), ("arm", "sampler"))
    if name == "guidance":
        return curves(rows, study.what, "cfg", ("recognised", "x_real", "recall"), scale="linear")
    return dots(rows, study.what) if len(study.seeds) > 1 else None


def commands(data, study, rows):
    """The commands that were run, a line for each arm."""
    lines, done = [], {r["arm"] for r in rows}
    for arm, stages in study.arms.items():
        if arm not in done:
            continue
        if isinstance(stages, str):
            lines.append(f"- {arm}: the weights `assets/{stages}`")
            continue
        typed = [f"`train.py {shlex.join(flags)} --data {data} --max-steps {steps[-1]}`"
                 for flags, steps in stages]
        lines.append(f"- {arm}: {', then with --init-inner '.join(typed)}".replace("--image-size half",
                                                                                  "--image-size 14"))
    return "\n".join(lines)


def judge_section(rows):
    """The scores of the judge itself, as text."""
    first, *cases = rows
    return (f"The classifier recognises {100 * first['recognised']:.2f}% of the test images. Half of the test images "
            f"are at distance {digits(first['distance'])} from the other half. Each case below has "
            f"{cases[0]['n']:,.0f} images:\n\n" + markdown(
                ["", "recognised", "distance", "distance / that of real images", "precision", "recall"],
                [[r["arm"], percent(r["recognised"]), digits(r["distance"]), digits(r["x_real"]),
                  f"{r['precision']:.2f}", f"{r['recall']:.2f}"] for r in cases]))


def took(rows):
    """-> minutes of one core: for training, and for drawing what was judged, where that was measured."""
    runs = groups(rows, "arm", "seed").values()
    return (sum(max(r["minutes"] for r in of) for of in runs),
            sum(r.get("seconds", 0) for r in rows if "recognised" in r) / 60)


def section(path):
    """All about one study, as text: its commands, tables and figure. The figure is drawn beside `path`. Raises
    UserError."""
    data, name = path.stem.split("-", 1)
    rows = read_rows(path)
    if rows and name == "judge":
        return judge_section(rows)
    if not rows or name not in STUDIES:
        raise UserError(f"no scores of a study in {path}: run benchmarks/evidence.py, or remove it")
    study, seeds = STUDIES[name], sorted({f"{r['seed']:.0f}" for r in rows})
    drawn, noised = [r for r in rows if "recognised" in r], [r for r in rows if "metric" in r]
    trained = not any(isinstance(stages, str) for stages in study.arms.values())
    which = f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"
    which += "" if trained else " of the samples, one training"
    parts = [f"`python benchmarks/evidence.py {name} --data {data}`, {which}:", commands(data, study, rows)]
    if trained:
        speeds = {r["arm"]: r["images_per_s"] for r in read_rows(path.with_name(f"{data}-speed.csv"))}
        parts.append(cost_table(rows, speeds if study.arms.keys() == FOUR.keys() else {}))
    parts.append(quality_table(drawn))
    if study.noise:
        parts.append(noise_table(drawn))
        if "MDM" in study.arms:
            parts.append("MDM also sees the coarse picture with noise of its own: for it the ratio is, in effect, 1.22 "
                         "times smaller.")
    if noised:
        parts.append(denoising_table(noised))
    if pyplot and (figure := figure_of(name, study, drawn)):
        figure.savefig(path.with_suffix(".png"), dpi=110)
        pyplot.close(figure)
    if path.with_suffix(".png").exists():
        parts.append(f"![{study.what}](../assets/evidence/{path.stem}.png)")
    return "\n\n".join(parts)


def put(page, name, text):
    """Replace the text between the lines <!-- name --> and <!-- end --> of the page. All other text stays."""
    found = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
    if not found.search(page):
        raise UserError(f"the page has no place for {name}: write the lines <!-- {name} --> and <!-- end -->")
    return found.sub(lambda place: f"{place[1]}\n{text}\n\n{place[2]}", page)


def everything(files):
    """-> {name: text} of all sections, and of "hours": how long the runs took."""
    found = {path.stem: section(path) for path in files}
    training, drawing = (sum(of) / 60 for of in zip((0, 0), *(
        took(read_rows(path)) for path in files if not path.stem.endswith("-judge"))))
    return found | {"hours": f"Training all these runs took {training:.1f} hours of one core, drawing their samples "
                             f"{drawing:.1f} hours."}


@cli.told_plainly()
def main(argv=None):
    p = cli.Parser(__doc__)
    p.add_argument("studies", nargs="*", metavar="DATA-STUDY", help="such as mnist-ode (default: all)")
    p.add_argument("--folder", type=Path, default=HERE.parent / "assets" / "evidence", help="where the scores are")
    p.add_argument("--into", type=Path, metavar="PAGE", help="write the tables into this page instead of printing them")
    args = p.parse_args(argv)
    order = ["judge", *STUDIES]
    found = everything([args.folder / f"{s}.csv" for s in args.studies] or sorted(
        (f for f in args.folder.glob("*-*.csv") if f.stem.split("-")[1] in order),
        key=lambda f: (f.stem[:5] != "mnist", order.index(f.stem.split("-")[1]))))
    if args.into:
        page = args.into.read_text("utf8")
        for name, text in found.items():
            page = put(page, name, text)
        checkpoint.replace(args.into, lambda f: f.write(page.encode()))
    else:
        print("\n\n\n".join(f"## {name}\n\n{text}" for name, text in found.items()))
    if not pyplot:
        print("no figures: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
