"""Pictures of trained networks: what they show is what their labels say."""
import pytest
import torch
from PIL import Image

from diffusion import UserError
from support import inside
from support.checkpoint import load_paper


def small(paper, **options):
    """An untrained network whose last layers are not zero -> (model, diffusion, args)."""
    torch.manual_seed(1)
    args = dict(model=paper, preset="tiny", shape=[1, 8, 8], num_classes=3, set=options, data="mnist")
    model, diffusion = load_paper(paper).build("tiny", (1, 8, 8), 3, **options)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model.eval(), diffusion, args


SMALL = {"dis": dict(width=16, depth=2, patch=2), "cunet": dict(nf=2),
         "mdm": dict(side=4, channels=[8, 8], outer=[dict(channels=[8, 8], blocks=[1, 1])], text_width=8, embedding=16),
         "diffussm": dict(width=8, depth=2, state=4)}


@pytest.mark.parametrize("paper", SMALL)
def test_a_picture_of_each_paper(paper, tmp_path, monkeypatch, capsys):
    """1,200 pixels wide, from samples of the network itself; all numbers are finite."""
    pytest.importorskip("matplotlib")
    load(monkeypatch, *small(paper, **SMALL[paper]))
    monkeypatch.setattr(inside, "FINE", 4)                              # of cU-Net
    inside.main(["--ckpt", "small.pt", "--out", str(tmp_path / "a.png")])
    picture, said = Image.open(tmp_path / "a.png"), capsys.readouterr().out
    assert picture.width == 1200 and 800 < picture.height < 2000
    assert "nan" not in said
    assert len(said.splitlines()) > 10


def load(monkeypatch, *run):
    monkeypatch.setattr(inside.checkpoint, "in_folder", lambda path: path)
    monkeypatch.setattr(inside.checkpoint, "read", lambda path: {"args": {"model": "dis"}})
    monkeypatch.setattr(inside.checkpoint, "load_run", lambda path: run)


def test_pictures_of_your_own(tmp_path):
    args = {"data": "where/they/were", "shape": [3, 8, 8], "num_classes": 2, "class_names": ["cat", "dog"]}
    for i, name in enumerate(("cat", "dog", "dog", "dog", "dog")):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
        if i == 3:
            with pytest.raises(UserError, match="has 4 images"):
                inside.pictures(None, None, args, data_dir=tmp_path)
    x0, cond = inside.pictures(None, None, args, data_dir=tmp_path)
    assert x0.shape == (5, 3, 8, 8) and cond["y"].tolist() == [0, 1, 1, 1, 1]
    few, _ = inside.pictures(None, None, {**args, "num_classes": 0, "class_names": []}, n=2, data_dir=tmp_path)
    assert torch.equal(few, x0[[0, 2]])                     # not only the first class; and a network may know none
    with pytest.raises(UserError, match="a folder like the one"):
        inside.pictures(None, None, {**args, "class_names": ["cat", "fox"]}, data_dir=tmp_path)


def test_what_cannot_be_drawn(monkeypatch, capsys):
    load(monkeypatch, *small("dis", **SMALL["dis"]))
    monkeypatch.setattr(inside, "pyplot", None)
    with pytest.raises(SystemExit):
        inside.main(["--ckpt", "small.pt"])
    assert "pip install matplotlib" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        inside.main(["--ckpt", "small.pt", "--out", "a.bmp"])
    assert "must be a file that ends in .png" in capsys.readouterr().err
    model, diffusion, trained = small("dis", **SMALL["dis"])
    for run, needed in (((torch.nn.Linear(1, 1), None, {"shape": [1, 8, 8]}), "is a Linear"),
                        ((model, diffusion, {**trained, "space": {"data": "mnist"}}), "for latents"),
                        (small("dis", **SMALL["dis"], T=40), "has T=40")):
        load(monkeypatch, *run)
        with pytest.raises(SystemExit):
            inside.main(["--ckpt", "small.pt"])
        assert needed in capsys.readouterr().err


@pytest.mark.parametrize("run, needed", [(("dis", {**SMALL["dis"], "depth": 1}), "no long skips"),
                                         (("diffussm", {**SMALL["diffussm"], "patch": 2}), "with patch=1")])
def test_networks_without_what_is_shown(run, needed, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    load(monkeypatch, *small(run[0], **run[1]))
    with pytest.raises(SystemExit):
        inside.main(["--ckpt", "small.pt"])
    assert needed in capsys.readouterr().err


# --- DiS --------------------------------------------------------------------------------------------------------

def noisy(model, diffusion, n=2):
    x_t, t = inside.noised(diffusion, torch.zeros(n, *model.shape), 300)
    return x_t, t, torch.arange(n)


def test_step_sizes_are_what_the_scans_read():
    """Also with tokens of the step and the class, and in the order of the patches."""
    model, diffusion, _ = small("dis", **SMALL["dis"], time="token")
    x_t, t, y = noisy(model, diffusion)
    read = []
    for block in inside.dis_blocks(model):
        for way in inside.WAYS:
            scan = getattr(block.mixer, way)
            scan.selective_scan = lambda u, delta, *rest, true=scan.selective_scan: (
                read.append(delta), true(u, delta, *rest))[1]
    delta = inside.step_sizes(model, x_t, t, y=y)
    assert delta.shape == (3, 2, 2, 16, 16)                             # blocks, directions, pictures, patches, e
    for i, of in enumerate(read):                                       # from the right, patch 0 is read last but ...
        assert torch.equal(delta[i // 2, i % 2], (of.flip(1) if i % 2 else of)[:, 2:])      # ... two tokens precede it


def test_half_lives():
    """After that many tokens the scan has forgotten half: a recurrence of the same decay tells."""
    model, diffusion, _ = small("dis", **SMALL["dis"])
    x_t, t, y = noisy(model, diffusion)
    delta = inside.step_sizes(model, x_t, t, y=y)
    life = inside.half_lives(model, delta)                              # (blocks, 2, e, N)
    A = -model.deep[0].mixer.backwards.A_log.exp()
    assert torch.allclose((delta[2, 1].mean((0, 1))[:, None] * A * life[2, 1]).exp(), torch.tensor(0.5))


def test_reach_is_the_gradient():
    """One direction sees only what it has read; the number is that of the Jacobian, up to its random probes."""
    model, diffusion, _ = small("dis", **SMALL["dis"])
    x_t, t, y = noisy(model, diffusion, 1)
    left, right, both = (inside.reach(model, x_t, t, 5, only, 512, y=y) for only in (*inside.WAYS, None))
    assert left.shape == (3, 4, 4)
    assert not left.flatten(1)[:, 6:].any() and left.flatten(1)[:, :6].all()
    assert not right.flatten(1)[:, :5].any() and right.flatten(1)[:, 5:].all() and both.all()
    stream = {}
    model.middle.register_forward_hook(lambda m, inputs, output: stream.update(x=sum(output)[0, 5]))

    def token(x):
        model(x, t, y)
        return stream["x"]
    slopes = torch.autograd.functional.jacobian(token, x_t)[:, 0, 0]    # (d, H, W)
    want = slopes.square().sum(0).view(4, 2, 4, 2).mean((1, 3)).sqrt()
    assert torch.allclose(both[1], want, rtol=0.2)


def test_cut_skips():
    """A deep block that gets zeros is one whose weights for the skip are zero."""
    model, diffusion, _ = small("dis", **SMALL["dis"])
    x_t, t, y = noisy(model, diffusion)
    whole, same, cut = model(x_t, t, y), *(inside.without_skips(model, which, x_t, t, y=y) for which in ([], [0]))
    assert torch.equal(whole, same) and not torch.allclose(whole, cut, atol=1e-4)
    with torch.no_grad():
        model.deep[0].skip_linear.weight[:, 16:] = 0
    assert torch.allclose(model(x_t, t, y), cut, atol=1e-6)


def test_swings(monkeypatch):
    """One channel is 4 times as large at the first patch of all pictures, the other a quarter: their mean is the same
    everywhere. Then a picture of its own kind."""
    delta = torch.ones(1, 2, 3, 4, 2)                                   # blocks, 2, b, J, e
    delta[..., 0, 0], delta[..., 0, 1] = 4, 1 / 4
    monkeypatch.setattr(inside, "step_sizes", lambda *look: delta)
    each, table = inside.swings(None, [()], {})
    assert each.shape == (1, *delta.shape) and torch.allclose(table, torch.tensor([[4.0, 1, 0]]), atol=1e-6)
    delta[:, :, 0] = delta[:, :, 0].flip(2)
    assert inside.swings(None, [()], {})[1][0, 2] > 0.3


# --- cU-Net -----------------------------------------------------------------------------------------------------

def test_flights_are_of_second_order():
    """They begin where the network starts the block, end where torchdiffeq ends, and z' = v, v' = a on the way."""
    model, diffusion, _ = small("cunet", nf=2)
    x_t, t, y = noisy(model, diffusion)
    starts = inside.starts(model, x_t, t, y=y)
    assert len(starts) == 9 and torch.equal(starts[0][1], model.condition(t, y))
    block, (state, e) = model.ups[-1], starts[-1]
    states, a = inside.flight(block, state, e)
    end = inside.with_solver(model, "dopri5", tolerance=1e-5).ups[-1](state, e)
    assert torch.equal(states[0], state) and torch.allclose(states[-1], end, atol=1e-3)
    z, v = states.chunk(2, dim=2)                                       # 2 x (times, b, C, h, w)
    for of, slope in ((z, v), (v, a)):
        assert torch.allclose((of[2:] - of[:-2]) * inside.FINE / 2, slope[1:-1], atol=1e-2 * slope.abs().max())
    assert not torch.allclose(a[0], a[-1], atol=1e-2)


def test_solver_errors(monkeypatch):
    """More steps are closer to the exact ODE; the network itself is not changed."""
    model, diffusion, _ = small("cunet", nf=2)
    x_t, t, y = noisy(model, diffusion)
    x0 = torch.zeros_like(x_t)
    monkeypatch.setattr(inside, "SOLVERS", {"euler": [1], "rk4": [1, 2, inside.FINE], "dopri5": [0.1, 1e-3]})
    found, exact = inside.solver_errors(model, diffusion, x0, x_t, t, y=y)
    evaluations, distance, error = found["rk4"].T
    assert evaluations.tolist() == [4, 8, 4 * inside.FINE] and distance[0] > distance[1] > distance[2] == 0
    assert error[2] == pytest.approx(exact) and error[0] == pytest.approx(model(x_t, t, y).square().mean().item())
    assert found["euler"][0, 0] == 1 and found["dopri5"][1, 1] < found["dopri5"][0, 1]
    assert model.ups[0].solver == "rk4" and model.ups[0].steps == 1


# --- MDM --------------------------------------------------------------------------------------------------------

def test_the_pyramid():
    """Both levels have the noise of their own schedule. The last belief is the sample."""
    model, diffusion, _ = small("mdm", **SMALL["mdm"])
    z, t = inside.noised_levels(diffusion, inside.reduced(diffusion, torch.zeros(64, 1, 8, 8)), 300)
    for z_r, level, side in zip(z, diffusion.levels, (4, 8), strict=True):
        assert z_r.shape == (64, 1, side, side) and z_r.std().item() == pytest.approx(
            level.tables["noise"][300].item(), rel=0.05)
    y = torch.arange(3)
    film = inside.pyramid(model, diffusion, torch.arange(3), y=y)
    assert [step[0] for step in film] == sorted((step[0] for step in film), reverse=True) and len(film) == 50
    assert film[0][0] == 999 and film[-1][0] == 0
    for t, z, x0 in film[::25]:                              # what a step saw, beside what it made of it
        believed = [x.clamp(-1, 1) for x in inside.beliefs(model, diffusion, z, torch.full((3,), t), y=y)]
        torch.testing.assert_close(believed, x0)
    assert torch.equal(film[-1][2][-1], diffusion.sample(model, (1, 8, 8), torch.arange(3), y=y))


def test_spectrum():
    """White noise of variance 1 has a power of 1 in all waves; a wave has all its power in one place."""
    noise = torch.randn(1000, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(inside.spectrum(noise), torch.ones(8), atol=0.05)
    wave = torch.sin(2 * torch.pi * 3 * torch.arange(16) / 16).expand(1, 1, 16, 16)
    power = inside.spectrum(wave)
    assert power.argmax() == 2 and power.sum() == pytest.approx(power[2].item())


def test_swapped():
    """Networks that believe their own z, or the other resolution's."""
    _, diffusion, _ = small("mdm", **SMALL["mdm"])
    x = inside.reduced(diffusion, torch.randn(4, 1, 8, 8))
    up = torch.nn.Upsample(scale_factor=2)
    cases = ((lambda z, t: z, 0, 0), (lambda z, t: [z[0], up(z[0])], 1, 0),
             (lambda z, t: [inside.reduced(diffusion, z[1])[0], z[1]], 0, 1))
    for model, *want in cases:
        belief, *parts = inside.swapped(model, diffusion, x, 300)
        assert torch.tensor(parts).allclose(torch.tensor(want).float(), atol=1e-5) and belief.shape == (4, 1, 8, 8)


# --- DiffuSSM ---------------------------------------------------------------------------------------------------

def test_kernels_lie_over_the_picture():
    """What the token in the middle reads is what the layer brings to it from a single token."""
    model, _, _ = small("diffussm", **SMALL["diffussm"])
    K, place = inside.kernels(model), 27
    assert K.shape == (2, 16, 64)
    over, ssm = inside.laid(K[1], 8, 8, place).flatten(1), model.blocks[1].ssm          # (2D, L)
    U = torch.eye(64)[:, :, None].expand(-1, -1, 16)                                    # a picture for each token
    with torch.no_grad():
        brought = ssm(U)[:, place].T.clone()                                            # (2D, L)
        brought[:, place] -= ssm.D
    assert torch.allclose(over, brought, atol=1e-5)
    assert not over[:8, place + 1:].any() and not over[8:, :place].any()


def test_states():
    """After `memory` tokens 1 / e is left; after a period a state has turned once, in one sense or the other."""
    model, _, _ = small("diffussm", **SMALL["diffussm"])
    ssm = model.blocks[0].ssm
    with torch.no_grad():
        ssm.log_dt[0] = 0.5                     # so fast that a state turns by more than half a turn in a token
    period, memory = inside.states(ssm)
    log_Abar = ssm.discretized()[0]
    assert torch.allclose((log_Abar.real * memory).exp(), torch.tensor(0.3679), atol=1e-4) and (period >= 2).all()
    turning = log_Abar.imag.abs() > 1e-6
    sense = (log_Abar.imag * period)[turning] / (2 * torch.pi)          # turns in a period, and some whole ones a token
    other = [sense, *(sense - k * period[turning] for k in (-1, 1))]
    assert torch.stack([(x.abs() - 1).abs() for x in other]).amin(0).max() < 1e-3


def test_at_rows():
    K = torch.zeros(4, 64)
    K[0, 8], K[1, 25], K[2, 12], K[3, 16], K[3, 20] = 1, 1, 1, 1, 1
    assert inside.at_rows(K, 8).tolist() == [1, 1, 0, 0.5]


def test_phase_errors():
    """A network that errs at every fourth pixel."""
    class Model:
        ratio = 4

        def __call__(self, x, t):
            return torch.tensor([0.0, 1, 0, 0]).repeat(2).expand_as(x)
    diffusion = small("diffussm", **SMALL["diffussm"])[1]
    assert inside.phase_errors(Model(), diffusion, torch.zeros(2, 1, 8, 8), 300).tolist() == [0, 4, 0, 0]


def test_sight():
    """The gradient of the pixel that is named, by small differences."""
    model, diffusion, _ = small("diffussm", **SMALL["diffussm"])
    x_t, t, y = noisy(model, diffusion, 1)
    step = torch.zeros(1, 1, 8, 8)
    step[0, 0, 5, 5] = 0.1
    with torch.no_grad():
        slope = (model(x_t + step, t, y) - model(x_t - step, t, y))[0, 0, 5, 6] / 0.2
    assert inside.sight(model, x_t, t, 5, 6, y=y)[5, 5].item() == pytest.approx(abs(slope.item()), rel=0.02) != 0
