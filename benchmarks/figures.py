"""Tables (Markdown) and figures (PNG) of the studies in assets/evidence/*.csv.

    python benchmarks/figures.py                            print all tables
    python benchmarks/figures.py mnist-cunet                print those of one study
    python benchmarks/figures.py --into docs/*.md           write each into the page that has its place, see `put`

Figures lie beside the scores. They need `pip install matplotlib`; without it there are tables only.
"""
import re
import statistics
import sys
from pathlib import Path

from evidence import BATCH, STUDIES, judges, read_rows     # first: it finds support/
from diffusion import UserError
from support import checkpoint, cli

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

COLOURS = ["#1f6fb4", "#d9701c", "#2f8f4e", "#b03060", "#6b5b95"]


def spread(values, form):
    """The mean; if there are several values, also the lowest and the highest. No value yet: an empty cell."""
    if not values:
        return ""
    mean = form(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({form(min(values))} to {form(max(values))})"


def number(x):
    """Three digits, and 10,529 instead of 1.05e+04."""
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"


FORMS = {"recognised": "{:.1%}".format, "distance": number, "x_real": number, "precision": "{:.2f}".format,
         "recall": "{:.2f}".format}


def markdown(head, lines):
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [head, ["---"] * len(head), *lines])


def groups(rows, key):
    """-> {value of this key: the rows that have it}, in the order in which they come."""
    found = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def table(rows, photographs=False):
    """What each arm costs, and what the judge says of it at the end. A distance is divided by that of n real images,
    and the head names n: distances with different n cannot be compared. The judge of photographs cannot tell
    precision."""
    columns = ["recognised", "x_real"] + ["precision"] * (not photographs) + ["recall"]
    (n,), lines = {row["n"] for row in rows}, []
    guidance = [cfg for cfg in groups(rows, "cfg") if cfg != 1]
    for arm, of in groups(rows, "arm").items():
        of = groups(of, "step")[max(row["step"] for row in of)]
        r, scales = of[0], groups(of, "cfg")
        lines.append([arm, len(scales[1]), f"{r['parameters']:,.0f}", f"{r['macs'] / 1e6:.0f}M",
                      f"{r['images'] / r['minutes'] / 60:.3g}", f"{r['images']:,.0f}",
                      *(spread([r[c] for r in scales[1]], FORMS[c]) for c in columns),
                      *(spread([r[c] for r in scales.get(cfg, [])], FORMS[c])
                        for cfg in guidance for c in columns[:2])])
    distance = f"distance / {n:,.0f} real"
    return markdown(["", "runs", "parameters", "multiply-adds", "images/s", "images seen", "recognised", distance,
                     *columns[2:], *(f"guidance {cfg:g}: {c}" for cfg in guidance for c in ("recognised", distance))],
                    lines)


def learning_curves(rows, title):
    """Distance over images seen, and over minutes. A thin line for each seed, a thick one for their mean."""
    rows, figure = groups(rows, "cfg")[1], Figure(figsize=(9.2, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title, fontsize=11)
    for axis, x, unit, label in ((axes[0], "images", 1000, "images seen, in thousands"),
                                 (axes[1], "minutes", 1, "minutes of one core")):
        for colour, (arm, of) in zip(COLOURS, groups(rows, "arm").items()):
            for seed in groups(of, "seed").values():
                axis.plot([r[x] / unit for r in seed], [r["x_real"] for r in seed], color=colour, linewidth=0.6)
            places = sorted(groups(of, x).items())
            axis.plot([at / unit for at, _ in places], [statistics.mean(r["x_real"] for r in of) for _, of in places],
                      marker="o", markersize=3, color=colour, linewidth=2, label=arm)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.grid(True, color="#dddddd", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        if x == "minutes":
            axis.set_xticks(sorted(groups(rows, x)))
            axis.set_xticks([], minor=True)
        for ticks, digits in (axis.xaxis, "25"), (axis.yaxis, "235"):
            ticks.set_major_formatter("{x:,g}")
            ticks.set_minor_formatter(lambda v, _, digits=digits: f"{v:,g}" if f"{v:g}"[0] in digits else "")
            ticks.set_tick_params(which="minor", labelsize=7)
    axes[0].set_ylabel(f"Frechet distance / that of {rows[0]['n']:.0f} real images", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def judge_section(rows):
    """The scores of the judge itself, as text."""
    accuracy, *cases = rows
    return (f"The classifier recognises {accuracy['recognised']:.2%} of the test images. Each case below has "
            f"{cases[0]['n']:,.0f} images:\n\n" + markdown(
                ["", "recognised", "distance", "distance / that of real images", "precision", "recall"],
                [[r["arm"], *(form(r[k]) for k, form in FORMS.items())] for r in cases]))


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
    last = {(r["arm"], r["seed"]): r["minutes"] for r in rows}
    rate, typed = " --lr-schedule constant" * (len(study.places) > 1), []
    for arm, of in groups(rows, "arm").items():
        end, stages = max(of, key=lambda r: r["step"]), study.arms[arm]
        steps = [end["images"] / BATCH - end["step"], end["step"]][-len(stages):]
        typed.append(f"- {arm}: " + ", then with --init-inner ".join(
            f"`train.py {flags} --data {data} --max-steps {n:.0f}{rate}`" for flags, n in zip(stages, steps)))
    means = "Means over the seeds (lowest to highest)" if len(seeds) > 1 else "One seed"
    parts = [f"`python benchmarks/evidence.py {name} --data {data} --seeds {' '.join(seeds)}`, {study.minutes} minutes "
             f"of one core for each run at its measured speed, {sum(last.values()) / 60:.1f} hours in all. {study.n:,} "
             f"samples, DDIM {study.steps}. {means}:", "\n".join(typed),
             table(rows, data == "cifar10")]
    if study.noise:
        errors = [[arm, *(spread([r[f"error_{ratio}"] for r in groups(of, "cfg")[1]], number)
                          for ratio in study.noise)] for arm, of in groups(rows, "arm").items()]
        parts.append(markdown(["squared error of x_0 at sigma / alpha =", *study.noise], errors))
    if len(study.places) > 1:
        if Figure:
            learning_curves(rows, study.what).savefig(path.with_suffix(".png"), dpi=110)
        parts.append(f"![{study.what}](../assets/evidence/{path.stem}.png)")
    return "\n\n".join(parts)


def put(pages, name, text):
    """Replace the text between the lines <!-- name --> and <!-- end --> in the list of pages. All other text stays."""
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
    if not any(map(place.search, pages)):
        raise UserError(f"no page has a place for {name}: write the lines <!-- {name} --> and <!-- end --> into one")
    return [place.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page) for page in pages]


@cli.told_plainly()
def main(argv=None):
    p = cli.Parser(__doc__)
    p.add_argument("studies", nargs="*", metavar="DATA-STUDY", help="such as mnist-cunet (default: all)")
    p.add_argument("--folder", type=Path, default=judges.ASSETS / "evidence", help="where the scores are")
    p.add_argument("--into", type=Path, nargs="+", metavar="PAGE", help="write them into pages; do not print")
    args = p.parse_args(argv)
    found = {name: section(args.folder / f"{name}.csv") for name in args.studies or sorted(
        f.stem for f in args.folder.glob("*-*.csv") if f.stem.split("-", 1)[1] in {"judge", *STUDIES})}
    if args.into:
        pages = [path.read_text("utf8") for path in args.into]
        for name, text in found.items():
            pages = put(pages, name, text)
        for path, page in zip(args.into, pages):
            checkpoint.replace(path, lambda f: f.write(page.encode()))
    else:
        print("\n\n\n".join(f"## {name}\n\n{text}" for name, text in found.items()))
    if not Figure:
        print("no figures: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
