"""What a paper's idea does inside a trained network: one command measures it, prints the numbers and draws a picture.

    python -m support.inside --ckpt assets/dis-mnist.pt

The pages in docs/ say what to see. Without --data-dir the network looks at pictures that it has drawn itself; with it,
at test images. What is shown comes from the papers' public functions, and from hooks on their modules. The functions
that measure need nothing more; drawing needs `pip install matplotlib`.
"""
import contextlib
import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

from diffusion import UserError, fold, normal
from support import checkpoint, cli, datasets
from support.pictures import make_folder, marks, to_uint8

try:
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

LEVELS = 50, 300, 600, 900          # the steps t, of 1000, that are shown: from little noise to much


# --- what the networks look at ----------------------------------------------------------------------------------

def pictures(model, diffusion, args, n=32, data_dir=None):
    """-> x0 (n, C, H, W) in [-1, 1], and {"y": labels (n,)} or {}: test images, or samples of the network itself."""
    classes, shape = args["num_classes"], tuple(args["shape"])
    if data_dir:
        if args["data"] in datasets.NAMES:
            dataset = datasets.load(args["data"], data_dir, shape[1:], "test", frames=args.get("frames"))
        else:
            dataset = datasets.load(data_dir, image_size=shape[1:])
            if dataset.shape != shape or classes and dataset.class_names != args["class_names"]:
                raise UserError(f"{data_dir} has images {dataset.shape} of classes {dataset.class_names}, but the "
                                f"network knows {shape} and {args['class_names']}: pass a folder like the one it was "
                                f"trained on")
        if len(dataset) < 5:
            raise UserError(f"{data_dir} has {len(dataset)} images: pass a folder of 5 or more")
        first = range(min(n, len(dataset)))
        if args["data"] not in datasets.NAMES:              # its files are sorted by class
            first = [i * len(dataset) // len(first) for i in first]
        batch = dataset[list(first)]
        return batch["x"] / 127.5 - 1, {"y": batch["y"]} if classes else {}
    cond = {"y": torch.arange(n) % classes} if classes else {}
    return diffusion.sample(model, shape, torch.arange(n), steps=str(min(25, diffusion.T)), **cond), cond


def noised(diffusion, x0, t):
    """x0 (b, C, H, W), t of 1000 -> x_t, and t (b,). Picture i has the same noise in every run."""
    t = torch.full((len(x0),), t * diffusion.T // 1000)
    return diffusion.q_sample(x0, t, normal(fold(torch.arange(len(x0)), t), x0.shape[1:])), t


def hooked(*handles):
    """Hooks for the time of a `with`."""
    stack = contextlib.ExitStack()
    for handle in handles:
        stack.enter_context(handle)             # at the end it removes its hook
    return stack


@contextlib.contextmanager
def watched(modules, keep):
    """For the time of a `with`, a list of keep(inputs, output) at each call of these modules, in their order."""
    calls = []
    with hooked(*(m.register_forward_hook(lambda _, inputs, output: calls.append(keep(inputs, output)))
                  for m in modules)):
        yield calls


# --- DiS --------------------------------------------------------------------------------------------------------

WAYS = "forwards", "backwards"


def dis_blocks(model):
    return [*model.shallow, model.middle, *model.deep]


def patches(model):
    """-> rows and columns of patches."""
    return [side // model.patch for side in model.shape[1:]]


@torch.no_grad()
def step_sizes(model, x_t, t, **cond):
    """-> Delta of every scan (blocks, 2, b, J, e): forwards, then backwards, both in the order of the patches. (The
    tokens of the step and the class, if there are any, are left out.)"""
    scans = [getattr(block.mixer, way) for block in dis_blocks(model) for way in WAYS]
    with watched([scan.dt_proj for scan in scans], lambda _, output: F.softplus(output)) as delta:
        model(x_t, t, **cond)
    delta = [d.flip(1) if i % 2 else d for i, d in enumerate(delta)]                   # [(b, L, e)]
    delta = torch.stack(delta)[:, :, -math.prod(patches(model)):]                      # (2 blocks, b, J, e)
    return rearrange(delta, "(block way) b j e -> block way b j e", way=2)


def half_lives(model, delta):
    """delta as from `step_sizes` -> after how many tokens a state has lost half of what it knew, at the mean step size
    of its channel: (blocks, 2, e, N)."""
    A = torch.stack([getattr(block.mixer, way).A_log.exp() for block in dis_blocks(model) for way in WAYS])
    A = rearrange(A.detach(), "(block way) e n -> block way e n", way=2)               # |A|
    return math.log(2) / (delta.mean((2, 3))[..., None] * A)


def reach(model, x_t, t, place, only=None, probes=32, **cond):
    """How much the token of one patch depends on each patch of a picture, after each block: the gradient of random
    sums of the token's channels, root mean square over a patch's pixels -> (blocks, rows, columns).

    x_t (1, C, H, W); place: the number of the patch. only: one of WAYS, to silence the other direction. Entry k is
    of the residual stream after block k, with what its mixer made, before a long skip joins it in the next block."""
    silent = [getattr(block.mixer, way) for block in dis_blocks(model) for way in WAYS if only not in (None, way)]
    cond = {name: c.expand(probes) for name, c in cond.items()}
    x = x_t.repeat(probes, 1, 1, 1).requires_grad_()
    with (hooked(*(m.register_forward_hook(lambda _, inputs, y: torch.zeros_like(y)) for m in silent)),
          watched(dis_blocks(model), lambda _, output: sum(output)) as streams):
        model(x, t.expand(probes), **cond)
    place -= math.prod(patches(model))                  # counted from the end: step and class stand before the patches
    maps = []
    for stream in streams:                                                             # (probes, L, d)
        v = normal(torch.arange(probes), stream.shape[2:])
        slope, = torch.autograd.grad((stream[:, place] * v).sum(), x, retain_graph=True)
        maps.append(F.avg_pool2d(slope.square().mean((0, 1))[None], model.patch)[0].sqrt())
    return torch.stack(maps)


@torch.no_grad()
def without_skips(model, cut, x_t, t, **cond):
    """The network's output if the deep blocks whose numbers are in `cut` get zeros from their long skips."""
    with hooked(*(model.deep[i].register_forward_pre_hook(
            lambda _, inputs: (*inputs[:2], torch.zeros_like(inputs[2]), *inputs[3:])) for i in cut)):
        return model(x_t, t, **cond)


@torch.no_grad()
def swings(model, looks, cond):
    """How much the step sizes differ within a picture, relative to their mean (of logarithms) over the picture ->
    their logarithms (levels, blocks, 2, b, J, e), and a table with a row for each level of noise: largest / smallest
    of a channel (the median of all), the same of the mean of all channels, and the share of the variance that is not
    alike in all pictures."""
    delta = torch.stack([step_sizes(model, *look, **cond) for look in looks]).log()    # (levels, blocks, 2, b, J, e)
    each = delta - delta.mean(4, keepdim=True)
    ranges = [(of.amax(4) - of.amin(4)).flatten(1).median(1).values.exp() for of in (each, each.mean(5, keepdim=True))]
    own = (each - each.mean(3, keepdim=True)).square().flatten(1).mean(1) / each.square().flatten(1).mean(1)
    return each, torch.stack([*ranges, own], dim=1)


def dis(figure, model, diffusion, args, x0, cond):
    """Draws into a matplotlib figure -> {what: numbers to print}."""
    if not model.deep:
        raise UserError("a network of one block has no long skips: pass a deeper one")
    looks, top = [noised(diffusion, x0, t) for t in LEVELS], [f"t = {t}" for t in LEVELS]
    grid, depth, fresh = patches(model), len(dis_blocks(model)), untrained(args)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.45, 1))
    said = {}

    each, table = swings(model, looks, cond)
    channel = (each.amax(4) - each.amin(4)).mean((0, 3)).argmax(-1)                    # (blocks, 2)
    scans = {f"{'last' if i else 'first'} block,\nfrom the {'right' if way else 'left'}": (i, way)
             for i in (0, -1) for way in (0, 1)}
    left, right = upper.subfigures(1, 2, width_ratios=(1.18, 1))
    means = [each[:, i, way, 0].mean(2) for i, way in scans.values()]                  # [(levels, J)], logarithms
    widest = [each[:, i, way, 0, :, channel[i, way]] for i, way in scans.values()]
    for part, title, rows, maps in (
            (left, "1a. Step size Delta at each patch, mean of all channels", ["x_t", *scans], means),
            (right, "1b. The same of the channel where it varies most", [""] * 5, widest)):
        tiles(part, title, [[x_t[0] for x_t, _ in looks], *(line.exp().unflatten(1, grid) for line in maps)], rows, top,
              "step size / its mean over the picture", [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], cmap="RdBu_r", norm="log")
    said |= {"step sizes, a row for each t: largest / smallest in a picture, of a channel and of the mean of all; "
             "share of the variance that is not alike in all pictures": table,
             "the same before training": swings(fresh, looks, cond)[1]}

    a, b, c = lower.subfigures(1, 3, width_ratios=(1, 0.9, 1.25))
    x_t, t = (of[:1] for of in looks[1])
    place = grid[0] // 2 * grid[1] - grid[1] // 2 - 1                                  # near the middle of the picture
    seen = torch.stack([reach(model, x_t, t, place, only, **{name: y[:1] for name, y in cond.items()})
                        for only in (*WAYS, None)])                                    # (3, blocks, rows, columns)
    seen = seen / seen.flatten(2)[:, :, place, None, None]
    shown = [0, depth // 2, depth - 1]
    tiles(a, f"2. What the token of a patch sees, {top[1]}", seen[:, shown].transpose(0, 1).clamp(min=1e-9),
          [f"{i + 1} block{'s' * (i > 0)}" for i in shown], ["from left", "from right", "both"],
          "gradient / that of the patch itself", [1e-4, 1e-3, 0.01, 0.1, 1], cmap="magma", norm="log")
    said["gradient of the other patches / that of the patch itself, mean; rows: from left, from right, both; a column "
         "for each block"] = (seen.sum((2, 3)) - 1) / (math.prod(grid) - 1)

    before, after = (torch.quantile(half_lives(net, step_sizes(net, *looks[1], **cond)).flatten(2), torch.tensor(
        [0.1, 0.5, 0.9]), dim=2) for net in (fresh, model))                            # (3, blocks, 2)
    axis, at = axes(b, "3. Half-lives of the states, in tokens"), torch.arange(1, depth + 1).numpy()
    axis.fill_between(at, *before[[0, 2]].mean(2).numpy(), color="#dddddd", label="before training")
    for way, colour, side in ((0, BLUE, "left"), (1, RED, "right")):
        axis.vlines(at + 0.2 * way - 0.1, *after[[0, 2], :, way].numpy(), colour, linewidth=3)
        axis.plot(at + 0.2 * way - 0.1, after[1, :, way].numpy(), "o", color=colour, label=f"from the {side}")
    for tokens, name in ((grid[1], "a row"), (math.prod(grid), "the picture")):
        axis.axhline(tokens, color="black", linewidth=0.8, linestyle=":")
        axis.text(depth + 0.6, tokens, name, va="center")
    axis.set(yscale="log", xlabel="block (dot: median; bar: 10% to 90%)")
    plain(axis)
    axis.legend(loc="upper left", frameon=False)
    said |= {"half-lives in tokens: 10%, median, 90% of the states; a column for each block; before training":
             before.mean(2), "trained, from the left": after[..., 0], "trained, from the right": after[..., 1]}

    cuts = {"all skips": [], "minus the\nlongest": [len(model.deep) - 1], "minus all": range(len(model.deep))}
    guesses = [[diffusion.predict_x0_eps(without_skips(model, cut, *look, **cond), *look)[0] for look in looks]
               for cut in cuts.values()]                                               # [[(b, C, H, W)]]
    errors = torch.tensor([[(guess - x0).square().mean() for guess in line] for line in guesses])
    changes = [[(guess - whole)[0].mean(0) for guess, whole in zip(line, guesses[0])] for line in guesses[1:]]
    tiles(c, "4. Its guess of x0, and how that changes\nwithout long skips (below: mean squared error)",
          [[guess[0] for guess in guesses[0]], *changes], list(cuts), top, "change of a pixel (black to white: 2)",
          [-0.5, 0, 0.5], [[f"{e:.4f}" for e in line] for line in errors], cmap="RdBu_r")
    return said | {"squared error of x0, a column for each t: all skips, without the longest, without any": errors}


# --- cU-Net -----------------------------------------------------------------------------------------------------

TIMES, FINE = (0, 500, 999), 32     # the diffusion steps t that are shown; so many steps of rk4 count as exact


@torch.no_grad()
def starts(model, x_t, t, **cond):
    """-> for each block (state (b, 2C, h, w), e): where the network starts it."""
    with watched(model.blocks(), lambda inputs, _: inputs) as found:
        model(x_t, t, **cond)
    return found


@torch.no_grad()
def flight(block, state, e):
    """The way of a state from t~ = 0 to 1 -> states (FINE + 1, b, 2C, h, w): z, then v; and their accelerations, as
    many with C channels."""
    scale, shift = block.film(e)[:, :, None, None].chunk(2, dim=1)
    states = [state]
    for i in range(FINE):
        states.append(block.rk4_step(i / FINE, (i + 1) / FINE, states[-1], scale, shift))
    slopes = [block.derivative(i / FINE, state, scale, shift) for i, state in enumerate(states)]
    return torch.stack(states), torch.stack(slopes).chunk(2, dim=2)[1]


def with_solver(model, solver, steps=1, tolerance=1e-3):
    """-> the same network with another solver."""
    model = copy.deepcopy(model)
    for block in model.blocks():
        block.solver, block.steps, block.rtol, block.atol = solver, steps, tolerance, tolerance
    return model


SOLVERS = {"euler": [1, 2, 4, 8, 16, 32], "midpoint": [1, 2, 4, 8, 16], "rk4": [1, 2, 4, 8],       # steps
           "dopri5": [1e-1, 1e-2, 1e-3, 1e-4]}                                                     # tolerances


@torch.no_grad()
def solver_errors(model, diffusion, x0, x_t, t, **cond):
    """-> {solver: (n, 3)}, a row for each of its settings: evaluations of the acceleration in a block (mean of the
    blocks); how far the x0 of the network is from that with the exact solution, root mean square; its squared error.
    And the squared error with the exact solution."""
    def guess(net):
        return diffusion.predict_x0_eps(net(x_t, t, **cond), x_t, t)[0]
    exact, found = guess(with_solver(model, "rk4", FINE)), {}
    for solver, settings in SOLVERS.items():
        nets = [with_solver(model, solver, **{"tolerance" if n < 1 else "steps": n}) for n in settings]
        found[solver] = torch.tensor([[net.nfe, (x - exact).square().mean().sqrt(), (x - x0).square().mean()]
                                      for net in nets for x in [guess(net)]])
    return found, (exact - x0).square().mean().item()


def cunet(figure, model, diffusion, args, x0, cond):
    """Draws into a matplotlib figure -> {what: numbers to print}."""
    x0, cond = x0[:8], {name: y[:8] for name, y in cond.items()}
    looks, top = [noised(diffusion, x0, t) for t in TIMES], [f"t = {t}" for t in TIMES]
    begun = [starts(model, *look, **cond) for look in looks]
    flights = [[flight(block, *start) for block, start in zip(model.blocks(), of)] for of in begun]
    upper, middle, lower = figure.subfigures(3, 1, height_ratios=(1, 1.05, 0.95))

    grid = axes(upper, "1. Eight pixels on their way through the last block, in the two main axes of (z, v). Line: the "
                "exact ODE. Marks: where solvers arrive", 3)
    for axis, title, of, start in zip(grid, top, flights, begun):
        ways = of[-1][0][:, 0].flatten(2)                                              # (times, 2C, h w)
        mean = ways.mean((0, 2))[:, None]
        U, S, _ = torch.linalg.svd((ways - mean).movedim(1, 0).flatten(1), full_matrices=False)
        pixels = (ways[-1] - ways[0]).norm(dim=0).argsort()[torch.linspace(0, ways.shape[2] - 1, 8).long()]
        lines = U[:, :2].T @ (ways[:, :, pixels] - mean)                               # (times, 2, 8)
        axis.plot(*lines.movedim(1, 0).numpy(), color="#888888", linewidth=1)
        axis.plot(*lines[0].numpy(), ".", color="black", label="start")
        for (name, *solver), mark in zip((("rk4, 1 step", "rk4"), ("2 steps", "rk4", 2), ("4 steps", "rk4", 4),
                                          ("dopri5", "dopri5")), "xvso"):
            with torch.no_grad():
                end = with_solver(model, *solver).blocks()[-1](*start[-1])[0].flatten(1)[:, pixels]    # (2C, 8)
            axis.plot(*(U[:, :2].T @ (end - mean)).numpy(), mark, label=name, fillstyle="none")
        axis.set_title(f"{title} (the two axes show {(S[:2].square().sum() / S.square().sum()):.0%} of the variance)")
    grid[0].legend(frameon=False)

    left, right = middle.subfigures(1, 2, width_ratios=(1.9, 1))
    times = {"t~ = 0": 0, "t~ = 0.5": FINE // 2, "t~ = 1": FINE}
    sizes = torch.stack([torch.stack([of[which][1][i, 0].square().mean(0).sqrt() for which in (0, -1)
                                      for i in times.values()]) for of in flights])    # (t, 6, H, W)
    tiles(left, "2. Size of the acceleration of each pixel (root mean square of the channels)",
          [[look[0][0], *line] for look, line in zip(looks, sizes)], top,
          ["x_t", *(f"{which} block\n{time}" for which in ("first", "last") for time in times)],
          "acceleration", marks(sizes.min() / 2, sizes.max() * 2), cmap="magma", norm="log")

    moved = torch.tensor([[(states[-1] - states[0]).chunk(2, 1)[0].norm() / states[0].chunk(2, 1)[0].norm()
                           for states, _ in of] for of in flights])                    # (t, blocks)
    axis, blocks = axes(right, "3. How far a block moves z, divided by z(0)"), range(1, len(model.blocks()) + 1)
    for line, colour, name in zip(moved, (BLUE, GREEN, RED), top):
        axis.plot(blocks, line.numpy(), "o-", color=colour, label=name)
    axis.axhline(1, color="black", linestyle=":", linewidth=0.8)
    axis.set(yscale="log", xlabel=f"block ({len(model.downs) + 1}: the bottleneck)", xticks=blocks)
    plain(axis)
    axis.legend(frameon=False)

    default = (model.bottleneck.solver, model.bottleneck.steps) == ("rk4", 1)
    star = "star: the solver of its training, rk4 with 1 step; " * default
    grid, said = axes(lower, f"4. Other solvers in the trained network ({star}dotted: the exact ODE)", 3), {}
    errors = {t: solver_errors(model, diffusion, x0, *looks[i], **cond) for i, t in enumerate(top[:2])}
    for axis, t, column, title in zip(grid, (top[1], *top), (1, 2, 2), (
            "x0, distance from that of the exact ODE", "x0, squared error", "x0, squared error")):
        found, exact = errors[t]
        for (name, rows), colour in zip(found.items(), (RED, GREEN, BLUE, "black")):
            axis.plot(*rows[:, [0, column]].T.numpy(), "o-", color=colour, label=name)
        if default:
            axis.plot(*found["rk4"][0, [0, column]].numpy(), "*", color=BLUE, markersize=18)
        if column == 2:
            axis.axhline(exact, color="black", linestyle=":", linewidth=1)
        axis.set(xscale="log", yscale="linear" if column == 2 else "log", title=f"{title}, {t}",
                 xlabel="evaluations of the acceleration in a block")
        plain(axis)
    grid[0].legend(frameon=False)
    for t, (found, exact) in errors.items():
        said |= {f"{t}, {name}: evaluations, distance of x0 from that of the exact ODE, squared error of x0": rows
                 for name, rows in [*found.items(), ("exact", torch.tensor([[math.inf, 0, exact]]))]}
    return said | {"how far a block moves z, divided by z(0); rows: t = 0, 500, 999; columns: blocks": moved}


# --- MDM --------------------------------------------------------------------------------------------------------

def reduced(diffusion, x0):
    """x0 (b, C, H, W) -> the picture at all resolutions, [(b, C, H_r, W_r)], the coarsest first."""
    return [checkpoint.load_paper("mdm").reduce(x0, shape) for shape in diffusion.shapes]


def noised_levels(diffusion, x, t):
    """[(b, C, H_r, W_r)], t of 1000 -> the same with the noise of step t, and t (b,)."""
    t = torch.full((len(x[0]),), t * diffusion.T // 1000)
    noise = diffusion.unpack(normal(fold(torch.arange(len(t)), t), (sum(diffusion.sizes),)))
    return [level.q_sample(x_r, t, eps) for level, x_r, eps in zip(diffusion.levels, x, noise)], t


@torch.no_grad()
def beliefs(model, diffusion, z, t, **cond):
    """-> what the network takes x0 to be, at all resolutions, [(b, C, H_r, W_r)]."""
    outs = model(diffusion.visible(z), t, **cond)
    return [level.predict_x0_eps(out, z_r, t)[0] for level, out, z_r in zip(diffusion.levels, outs, z)]


def pyramid(model, diffusion, seeds, **cond):
    """Draws -> for each of 50 steps, the noisiest first, (t, z and beliefs of all resolutions, [(b, C, H_r, W_r)])."""
    t, said = diffusion.respaced("50")[0].timestep_map.tolist(), []
    zs = [diffusion.unpack(normal(fold(seeds, diffusion.T), (sum(diffusion.sizes),)))]

    def keep(i, z, x0):                         # on_step gets the z that the step has made, and we want what it saw
        said.append((t[i], zs[-1], x0))
        zs.append(z)
    diffusion.sample_levels(model, diffusion.shapes[-1], seeds, **cond, on_step=keep)
    return said


def spectrum(x):
    """x (b, C, H, W) -> the mean power of waves, 1 to min(H, W) / 2 of them in a picture. That of white noise is 1."""
    H, W = x.shape[2:]
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean((0, 1))
    waves = torch.hypot(torch.fft.fftfreq(H, 1 / H)[:, None], torch.fft.fftfreq(W, 1 / W)).round()     # (H, W)
    return torch.stack([power[waves == k].mean() for k in range(1, min(H, W) // 2 + 1)])


def swapped(model, diffusion, x, t, **cond):
    """The coarsest z is exchanged for that of another picture, and then all others are -> the beliefs at the finest
    resolution in the first case (b, C, H, W), and two numbers: how far the finest belief went in the first case, and
    the coarsest in the second. 0: it stayed as without exchange; 1: it is what the network believes of the other."""
    z, t = noised_levels(diffusion, x, t)
    other = [z_r.roll(1, 0) for z_r in z]
    own, theirs, first, second = (beliefs(model, diffusion, mix, t, **cond) for mix in (
        z, other, [other[0], *z[1:]], [z[0], *other[1:]]))

    def part(belief, r):
        way = theirs[r] - own[r]
        return ((belief[r] - own[r]) * way).sum() / way.square().sum()
    return first[-1], part(first, -1), part(second, 0)


def mdm(figure, model, diffusion, args, x0, cond):
    """Draws into a matplotlib figure -> {what: numbers to print}."""
    names, x = [f"{shape[-2]} x {shape[-1]}" for shape in diffusion.shapes], reduced(diffusion, x0)
    fine, coarse, ts, colours = names[-1], names[0], range(0, 1000, 111), (RED, BLUE, GREEN)
    upper, middle, lower = figure.subfigures(3, 1, height_ratios=(0.5 * len(names), 0.9, 1.1))

    film = pyramid(model, diffusion, torch.arange(len(x0)), **cond)
    shown = [film[i] for i in (0, 5, 10, 15, 20, 27, 35, 49)]
    tiles(upper, "1. A picture is drawn: z at each resolution, and what the network believes the picture to be",
          [[(z, belief)[k][r][4] for _, z, belief in shown] for r in range(len(names)) for k in (0, 1)],
          [f"{name}\n{what}" for name in names for what in ("z", "belief")], [f"t = {t}" for t, *_ in shown])

    a, b, c = axes(middle, "", 3)
    end = film[-1][2]
    left = torch.tensor([[(guess[r] - end[r]).square().mean() / (end[r] - end[r].mean(0)).square().mean()
                          for *_, guess in film] for r in range(len(names))])          # (R, steps)
    looks = [noised_levels(diffusion, x, t) for t in ts]
    guesses = [beliefs(model, diffusion, *look, **cond) for look in looks]
    errors = torch.tensor([[(guess[r] - x[r]).square().mean() for guess in guesses] for r in range(len(names))]
                          + [[(reduced(diffusion, guess[-1])[0] - x[0]).square().mean() for guess in guesses]])
    for r, (name, colour, level) in enumerate(zip(names, colours, diffusion.levels)):
        a.plot([t for t, *_ in film], left[r].numpy(), color=colour, label=name)
        c.plot(ts, errors[r].numpy(), "o-", color=colour, label=name)
        power = spectrum(x[r])
        for t in LEVELS[1:]:
            ratios = (level.tables["snr"][t * diffusion.T // 1000] * power).numpy()
            b.plot(range(1, len(power) + 1), ratios, color=colour, label=name if t == LEVELS[1] else None)
            if r == len(names) - 1:
                b.text(len(power) * 1.05, ratios[-1], f"t = {t}", va="center")
    c.plot(ts, errors[-1].numpy(), "--", color=colours[r], label=f"{fine}, shrunk to {coarse}")
    b.axhline(1, color="black", linewidth=0.8, linestyle=":")
    a.set(title="2. Distance of the belief from the end\n(1: as far as the mean picture)", xlabel="t, as it is drawn")
    a.invert_xaxis()
    b.set(title="3. Signal / noise (power) in each wave", yscale="log", xscale="log", xlabel="waves in a picture")
    c.set(title="4. Squared error of x0", yscale="log", xlabel="t")
    for axis in (a, b, c):
        axis.legend(frameon=False)
    plain(b)
    plain(c)

    left_, right = lower.subfigures(1, 2)
    none = {name: torch.full_like(y, -1) for name, y in cond.items()}                  # the class would tell
    zs = [noised_levels(diffusion, x, t) for t in LEVELS]
    tiles(left_, f"5. The {coarse} pixels of another picture", [
        [z[-1][0] for z, _ in zs], [beliefs(model, diffusion, *look, **none)[-1][0] for look in zs],
        [z[0][-1] for z, _ in zs], [swapped(model, diffusion, x, t, **none)[0][0] for t in LEVELS]],
          [f"z, {fine}", "belief", f"z, {coarse},\nof another", "belief\nwith that"], [f"t = {t}" for t in LEVELS])
    pulls = torch.tensor([swapped(model, diffusion, x, t, **none)[1:] for t in ts]).T  # (2, steps)
    axis = axes(right, "6. Whom a belief follows: 0, its own z; 1, that of the other resolutions")
    for line, colour, label in zip(pulls, (colours[r], colours[0]), (
            f"belief at {fine}, if z at {coarse} is another's", f"belief at {coarse}, if all other z are another's")):
        axis.plot(ts, line.numpy(), "o-", color=colour, label=label)
    axis.set(xlabel="t", ylim=(-0.05, 1.05), ylabel="share of the way to the other picture")
    axis.legend(frameon=False)
    return {"t of the columns below": torch.tensor([ts]).float(), "squared error of x0, a row for each resolution, the "
            f"coarsest first; then {fine} shrunk to {coarse}": errors, "6: the finest belief, the coarsest": pulls,
            "distance of the belief from the end, a row for each resolution, while it is drawn; columns: t":
            torch.cat([torch.tensor([[float(t) for t, *_ in film]]), left])[:, ::7]}


# --- DiffuSSM ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def kernels(model):
    """-> the kernels of all blocks (blocks, 2D, L), without the direct path: what a token gets from the one l before
    it (the first D channels) or behind it (the others)."""
    L, paper = math.prod(model.shape[1:]) // model.patch**2, checkpoint.load_paper("diffussm")
    return torch.stack([paper.kernel(*block.ssm.discretized(), L) for block in model.blocks])


def laid(K, rows, columns, place):
    """Kernels (2D, L) as they lie over the picture if the token `place` reads: (2D, rows, columns)."""
    D, L = len(K) // 2, K.shape[1]
    over = torch.zeros_like(K)
    over[:D, :place + 1] = K[:D, :place + 1].flip(1)
    over[D:, place:] = K[D:, :L - place]
    return over.unflatten(1, (rows, columns))


def at_rows(K, columns, n=3):
    """The share of a kernel's energy that is 1, .., n rows away, give or take a token, of all up to n rows: (2D,)."""
    energy = K[:, 2:n * columns + 2].square()                           # from 2 tokens away
    whole = torch.zeros(energy.shape[1], dtype=torch.bool)
    for k in range(1, n + 1):
        whole[k * columns - 3:k * columns] = True
    return energy[:, whole].sum(1) / energy.sum(1)


@torch.no_grad()
def states(ssm):
    """-> of each state its period in tokens, and after how many tokens it has kept 1 / e; both (2D, N/2)."""
    log_Abar, _ = ssm.discretized()
    angle = torch.remainder(log_Abar.imag.abs(), 2 * math.pi)           # faster than half a turn a token looks slower
    return 2 * math.pi / torch.minimum(angle, 2 * math.pi - angle), -1 / log_Abar.real


def sight(model, x_t, t, row, column, **cond):
    """The gradient of a pixel of the output by each of the input, absolute, mean of the pictures x_t: (H, W)."""
    x = x_t.clone().requires_grad_()
    slope, = torch.autograd.grad(model(x, t, **cond)[:, 0, row, column].sum(), x)
    return slope.abs().sum(1).mean(0)


@torch.no_grad()
def phase_errors(model, diffusion, x0, t, **cond):
    """The squared error of x0 for each of the M places in a fold, divided by their mean: (M,). The pictures are moved
    by 0 to M - 1 pixels, so that each place sees the same pictures."""
    M, errors = model.ratio, 0
    for shift in range(M):
        moved = x0.roll(shift, 3)
        x_t, steps = noised(diffusion, moved, t)
        guess = diffusion.predict_x0_eps(model(x_t, steps, **cond), x_t, steps)[0]
        errors += (guess - moved).square().mean((0, 1)).flatten().unflatten(0, (-1, M)).mean(0)
    return errors / errors.mean()


def diffussm(figure, model, diffusion, args, x0, cond):
    """Draws into a matplotlib figure -> {what: numbers to print}."""
    if model.patch > 1 or model.shape[2] % model.ratio:
        raise UserError("a fold of this network is not some pixels of one row, as these pictures suppose: pass a run "
                        "with patch=1 and a width divisible by its ratio")
    M, fresh, ends = model.ratio, untrained(args), {"first block": 0, "last block": -1}
    rows, columns = (side // model.patch for side in model.shape[1:])
    K, before = kernels(model), kernels(fresh)                                         # (blocks, 2D, L)
    D, place = K.shape[1] // 2, rows // 2 * columns + columns // 2                     # the token in the middle
    upper, middle, lower = figure.subfigures(3, 1, height_ratios=(0.85, 0.9, 1))

    left, right = upper.subfigures(1, 2, width_ratios=(1, 3))
    over = [laid(K[i], rows, columns, place) for i in ends.values()]                   # 2 x (2D, rows, columns)
    sizes = [o.square().sum(0).div(D).sqrt() for o in over]
    tiles(left, "1a. What the token in the middle reads:\nsize of all kernels", [[size / size.max()] for size in sizes],
          list(ends), [""], "kernel / its largest value", [0.01, 0.1, 1], cmap="magma", norm="log")
    best = [at_rows(K[i], columns).view(2, D).topk(2).indices + torch.tensor([[0], [D]]) for i in ends.values()]
    near = slice(max(0, rows // 2 - 7), rows // 2 + 8)
    tiles(right, "1b. 15 rows of the kernels that look most at whole rows, two of each direction",
          [[o[n, near] / o[n].abs().max() for n in of.flatten()] for o, of in zip(over, best)], ["", ""],
          ["from the left"] * 2 + ["from the right"] * 2, "kernel / its largest value", [-1, 0, 1], cmap="RdBu_r")

    a, b, c = axes(middle, "", 3)
    lags = range(1, min(4 * columns, K.shape[2]))
    a.plot(lags, before[:, :, lags].square().mean((0, 1)).sqrt().numpy(), color="#aaaaaa", label="before training")
    for (name, i), colour in zip(ends.items(), (BLUE, RED)):
        a.plot(lags, K[i, :, lags].square().mean(0).sqrt().numpy(), color=colour, label=name)
    for n in range(1, 4):
        a.axvline(n * columns, color="black", linestyle=":", linewidth=0.8)
    a.set(title="2. Size of the kernels (dotted: whole rows)", yscale="log", xlabel="tokens away")
    ways = [states(net.blocks[-1].ssm) for net in (fresh, model)]                      # 2 x 2 x (2D, N/2)
    for way, colour, size, label in zip(ways, ("#bbbbbb", BLUE), (14, 2), ("before training", "trained")):
        b.scatter(*(x[::2].flatten().numpy() for x in way), size, color=colour, linewidths=0, label=label)
    b.set(title="3. States of the last block", xscale="log", yscale="log", xlim=(1.8, 1000), xlabel="period in tokens",
          ylabel="memory in tokens")
    phases = torch.stack([phase_errors(model, diffusion, x0, t, **cond) for t in LEVELS])      # (levels, M)
    for line, colour, t in zip(phases, (GREEN, BLUE, RED, "black"), LEVELS):
        c.plot(range(M), line.numpy(), "o-", color=colour, label=f"t = {t}")
    c.set(title="4. Squared error of x0 / its mean", xticks=range(M), ylim=(0, 1.5),
          xlabel=f"place of a pixel among the {M} of a fold")
    for axis in (a, b, c):
        axis.legend(frameon=False)
        plain(axis)

    row, first = model.shape[1] // 2, model.shape[2] // 2 // M * M                     # of the fold in the middle
    seen = [[sight(model, *noised(diffusion, x0, t), row, first + m, **cond) for m in range(M)] for t in LEVELS[1::2]]
    tiles(lower, "5. What a pixel in the middle of the output depends on: gradient by each pixel of x_t, mean of all "
          "pictures", [[s / s.max() for s in line] for line in seen], [f"t = {t}" for t in LEVELS[1::2]],
          [f"place {m} of a fold" for m in range(M)], "gradient / its largest value", [1e-3, 0.01, 0.1, 1],
          cmap="magma", norm="log")
    parts = torch.tensor([0.1, 0.5, 0.9])
    spread = [torch.stack([x.flatten().quantile(parts, interpolation="nearest") for x in way]) for way in ways]
    return {"share of the kernels' energy near whole rows, a column for each block; before training, trained":
            torch.stack([torch.stack([at_rows(k, columns).mean() for k in net]) for net in (before, K)]),
            "states of the last block: 10%, median, 90% of periods, then of memories; before training": spread[0],
            "trained": spread[1],
            f"gradient by pixels of the same row, t = {LEVELS[1]}: the fold before, its own, the fold behind; a row "
            "for each place": torch.stack([line[row, first - M:first + 2 * M] / line.max() for line in seen[0]]),
            "squared error of x0 / its mean, a row for each t, a column for each place": phases}


# --- drawing ----------------------------------------------------------------------------------------------------

BLUE, RED, GREEN = "#1f6fb4", "#d9701c", "#2f8f4e"


def untrained(args):
    """The network as it was before training, but for its random numbers."""
    paper = checkpoint.load_paper(args["model"])
    torch.manual_seed(0)
    return paper.build(args["preset"], tuple(args["shape"]), args["num_classes"],
                       **checkpoint.before(args))[0].eval()


def axes(figure, title, n=1):
    """-> n axes side by side (one, if n is 1), with a title above them."""
    figure.suptitle(title, x=0.01, ha="left")
    grid = figure.subplots(1, n, squeeze=False)[0]
    for axis in grid:
        axis.spines[["top", "right"]].set_visible(False)
    return grid if n > 1 else grid[0]


def plain(axis):
    """Numbers of logarithmic axes without powers of ten."""
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "125" else "")


def tiles(figure, title, values, rows, columns, unit=None, ticks=None, below=None, **look):
    """values[r][c]: numbers (H, W), whose colours ticks[0] to ticks[-1] explain, or a picture (C, H, W) in [-1, 1].
    below[r][c]: what to write under it."""
    figure.suptitle(title, x=0.01, ha="left")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for r, line in enumerate(values):
        for c, value in enumerate(line):
            axis = grid[r, c]
            axis.set(xticks=[], yticks=[], title=columns[c] if r == 0 else "", xlabel=below[r][c] if below else "")
            if value.ndim == 3:
                axis.imshow(to_uint8(value[None])[0], "gray", vmin=0, vmax=255)
            else:
                shown = axis.imshow(value.numpy(), vmin=ticks[0], vmax=ticks[-1], **look)
            if c == 0:
                axis.set_ylabel(rows[r], rotation=0, ha="right", va="center")
    if unit:
        bar = figure.colorbar(shown, ax=grid, label=unit, location="bottom", shrink=0.7, aspect=40, pad=0.02)
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.ax.minorticks_off()


# --- command line -----------------------------------------------------------------------------------------------

# The class of a network: what draws it, and how high the picture is, in inches.
DRAW = {"DiS": (dis, 12.2), "CUNet": (cunet, 12.5), "NestedUNet": (mdm, 13), "DiffuSSM": (diffussm, 12.5)}


@cli.told_plainly()
def main(argv=None):
    p = cli.Parser(__doc__)
    p.add_argument("--ckpt", required=True, metavar="PATH", help="a checkpoint, or a run's folder")
    p.add_argument("--data-dir", help="look at test images from this folder (default: at samples of the network)")
    p.add_argument("--out", default="inside.png", help="the picture, 1,200 pixels wide")
    args = p.parse_args(argv)
    own = checkpoint.read(checkpoint.in_folder(args.ckpt))["args"]["model"]
    if own.endswith(".py"):
        raise UserError(f"{args.ckpt} is a run of {own}: pass a {', '.join(DRAW)}")
    model, diffusion, trained = checkpoint.load_run(args.ckpt)
    if type(model).__name__ not in DRAW or len(trained["shape"]) != 3 or trained.get("space"):
        raise UserError(f"{args.ckpt} is a {type(model).__name__} for {'latents ' * bool(trained.get('space'))}"
                        f"{trained['shape']}: pass a {', '.join(DRAW)} for pictures")
    if not args.out.lower().endswith((".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")):
        raise UserError(f"--out {args.out} must be a file that ends in .png, .jpg, .pdf, .svg or .webp")
    if diffusion.T < 50:
        raise UserError(f"{args.ckpt} has T={diffusion.T}: pass a run with T of 50 or more")
    if not pyplot:
        raise UserError("drawing needs matplotlib: pip install matplotlib")
    make_folder(Path(args.out).resolve().parent)
    draw, height = DRAW[type(model).__name__]
    x0, cond = pictures(model, diffusion, trained, data_dir=args.data_dir)
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9, "figure.titlesize": 11, "svg.fonttype": "none"}):
        figure = pyplot.figure(figsize=(12, height), dpi=100, layout="constrained")
        for what, numbers in draw(figure, model, diffusion, trained, x0, cond).items():
            print(what, *(" ".join(f"{n:9.4g}" for n in line) for line in numbers.tolist()), sep="\n    ")
        figure.savefig(args.out)
        pyplot.close(figure)
    if trained.get("text"):
        print("captions    none: here the network draws without a text")
    print(f"picture     {args.out}")


if __name__ == "__main__":
    cli.run(main)
