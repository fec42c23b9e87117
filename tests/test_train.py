"""train.py and sample.py as a user runs them: exact resume, processes, seeds, stopping."""
import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tqdm
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import ranks
import sample
import train
from diffusion import Diffusion, cosine_alpha_bar, fold
from support import checkpoint, cost, datasets, latents, log, parallel, prepare
from support.optimizer import matrices
from support.pictures import SHADES, grid_image

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("counted_once")         # conftest.py
# A DiS that takes 15 ms a step.
SMALL = ["--image-size", "16", "--set", "width=32", "depth=2", "state=4", "--global-batch-size", "8",
         "--warmup-steps", "4", "--sample-every", "0", "--device", "cpu"]


def run(folder, *flags):
    train.main([*SMALL, "--results-dir", str(folder), "--name", "run", *map(str, flags)])
    return torch.load(folder / "run" / "latest.pt", weights_only=True)


def shell(*command, cwd=ROOT, **kwargs):
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True,
                          timeout=200, **kwargs)


def same(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def losses(folder):
    with open(folder / "run" / "log.csv", newline="") as f:
        rows = [(int(r["step"]), float(r["loss"])) for r in csv.DictReader(f)]
    assert rows == sorted(dict(rows).items())           # no step twice
    return dict(rows)


# --- resume ---

def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    """SIGKILL in mid-run; then weights, average, optimizer and log are those of a run that was left alone."""
    flags = ["--max-steps", 60, "--ckpt-every", 10, "--log-every", 5]
    whole = run(tmp_path / "whole", *flags)
    [process] = ranks.start(tmp_path / "said", 1, "train.py", *SMALL, "--results-dir", tmp_path / "cut", "--name",
                            "run", *flags)
    latest = tmp_path / "cut" / "run" / "checkpoints" / "0000020.pt"
    while not latest.exists() and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    killed = torch.load(tmp_path / "cut" / "run" / "latest.pt", weights_only=True)["step"]
    assert 10 <= killed < 60                        # 10: killed in the middle of saving 20
    resumed = run(tmp_path / "cut", *flags)
    for part in ("model", "ema", "opt", "step", "images"):
        assert same(whole[part], resumed[part]), part
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert not list((tmp_path / "cut").rglob("*.tmp"))


def test_sigterm_stops_all_processes_together(tmp_path):
    flags = [*SMALL, "--results-dir", tmp_path, "--name", "run", "--max-steps", 5000, "--log-every", 1]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "train.py", *map(str, flags)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True)
    log = tmp_path / "run" / "log.csv"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=100)
    assert "The same command continues" in out
    stopped = torch.load(tmp_path / "run" / "latest.pt", weights_only=True)["step"]
    assert stopped == max(losses(tmp_path)) >= 4
    assert run(tmp_path, "--max-steps", stopped + 2)["step"] == stopped + 2    # now with one process


def test_finished_run_says_so_and_goes_on_with_more_steps(tmp_path, capsys):
    run(tmp_path, "--max-steps", 4)
    before = (tmp_path / "run" / "latest.pt").read_bytes()
    run(tmp_path, "--max-steps", 4)
    assert "trained     4 of 4" in capsys.readouterr().out
    assert (tmp_path / "run" / "latest.pt").read_bytes() == before
    assert run(tmp_path, "--max-steps", 6)["step"] == 6


def test_a_resumed_run_lets_go_of_its_file(tmp_path):
    """Windows does not replace a file that is mapped into memory."""
    saved = run(tmp_path, "--max-steps", 1)
    weights = [torch.zeros(s["exp_avg"].shape) for s in saved["opt"]["state"].values()]
    optimizer = torch.optim.AdamW(weights)
    mapped = [s["exp_avg"] for s in saved["opt"]["state"].values()]
    parallel.load_optimizer(optimizer, saved["opt"])
    for w, old in zip(weights, mapped, strict=True):
        assert torch.equal(optimizer.state[w]["exp_avg"], old)
        assert optimizer.state[w]["exp_avg"].data_ptr() != old.data_ptr()


def test_moments_take_the_layout_of_their_weight():
    """Those of a run with shards are contiguous. AdamW pairs numbers by their place in memory."""
    steps = []
    for form in torch.channels_last, torch.contiguous_format:
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(conv.parameters(), fused=True)
        for rate in 1e-3, 1e-2:
            conv(torch.randn(2, 4, 8, 8)).square().sum().backward()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            state = optimizer.state_dict()
            state["state"] = {i: {k: v.contiguous(memory_format=form if v.ndim == 4 else torch.contiguous_format)
                                  for k, v in s.items()} for i, s in state["state"].items()}
            parallel.load_optimizer(optimizer, state)
        steps.append(conv.weight.detach())
    assert torch.equal(*steps)


def test_a_flag_that_is_given_twice_counts_twice():
    args = train.parse("--set width=96 --set depth=2 --hold-out moon --hold-out star".split())
    assert args.set == {"width": 96, "depth": 2} and args.hold_out == ["moon", "star"]
    assert sample.parse(["--prompt", "a moon", "--prompt", "a star"]).prompt == ["a moon", "a star"]


def test_a_run_keeps_its_options_when_its_preset_changes(tmp_path, monkeypatch):
    paper = checkpoint.load_paper("diffussm")
    net, _ = paper.build("tiny", (1, 8, 8))
    args = dict(model="diffussm", preset="tiny", shape=[1, 8, 8], num_classes=0, set={}, options=paper.CONFIGS["tiny"])
    torch.save({"version": 1, "model": net.state_dict(), "ema": net.state_dict(), "step": 1, "args": args},
               tmp_path / "run.pt")
    now = SimpleNamespace(**{**args, "options": {**args["options"], "predict": "v"}})
    monkeypatch.setitem(paper.CONFIGS, "tiny", now.options)
    assert checkpoint.load_run(tmp_path / "run.pt")[1].predict == "x0"
    assert checkpoint.differences(now, args, {"options"}) == ["--set predict=v (was predict=x0)"]
    # an older run, when these presets had no t_normal
    for model, preset in [("diffussm", "mini"), ("mdm", "mini"),
                          *(("cunet", p) for p in ("tiny", "mini", "unet-tiny", "unet-mini"))]:
        options = checkpoint.load_paper(model).CONFIGS[preset]
        old = dict(model=model, preset=preset, set={}, options={k: v for k, v in options.items() if k != "t_normal"})
        found = checkpoint.differences(SimpleNamespace(options=options, set={}), old, {"options"})
        assert found == ["--set t_normal=[0.4, 1.3] (was t_normal=None)"]
    # before runs wrote down all options, only --set was compared; and MDM's tiny presets predicted v
    del args["options"]
    args["preset"] = "DiffuSSM-S"
    assert checkpoint.differences(now, args, {"options"}) == []
    now.set = {"predict": "v"}
    assert checkpoint.differences(now, args, {"options"}) == ["--set predict=v (was nothing)"]
    mdm = SimpleNamespace(set={}, options=checkpoint.load_paper("mdm").CONFIGS["tiny"])
    assert "predict=v error=v" in checkpoint.differences(mdm, dict(model="mdm", preset="tiny", set={}), {"options"})[0]


def test_resume_none_keeps_the_old_run(tmp_path):
    old = run(tmp_path, "--max-steps", 3)
    run(tmp_path, "--max-steps", 2, "--resume", "none")
    kept = torch.load(tmp_path / "run.old1" / "latest.pt", weights_only=True)
    assert same(old, kept)


def test_a_run_without_its_checkpoints_is_kept_beside_the_new_one(tmp_path, capsys):
    run(tmp_path, "--max-steps", 3, "--log-every", 1)
    log = (tmp_path / "run" / "log.csv").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "latest.pt").unlink()
    run(tmp_path, "--max-steps", 2, "--lr", "0.5")
    assert (tmp_path / "run.old1" / "log.csv").read_bytes() == log and "run.old1" in capsys.readouterr().out
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        run(tmp_path, "--max-steps", 2, "--name", "file")
    assert "is a file: pass another --name" in capsys.readouterr().err


def test_resume_from_a_file_starts_a_new_folder(tmp_path):
    run(tmp_path, "--max-steps", 4, "--ckpt-every", 2, "--keep-ckpts", 5)
    whole = run(tmp_path, "--max-steps", 8, "--keep-ckpts", 5)
    again = run(tmp_path / "other", "--max-steps", 8, "--resume",
                tmp_path / "run" / "checkpoints" / "0000004.pt")
    assert same(whole["model"], again["model"])


def test_non_finite_loss_stops_with_the_step(tmp_path, capsys):
    """Also in a run that begins from a good checkpoint with a new rate; that file stays as it is."""
    run(tmp_path, "--max-steps", 2)
    good = tmp_path / "run" / "latest.pt"
    before = good.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "bad", "--max-steps", 50, "--lr", "1e18", "--ckpt-every", 5, "--resume", good)
    assert stopped.value.code == 2
    assert "not finite at step" in capsys.readouterr().err
    assert not (tmp_path / "bad" / "run" / "latest.pt").exists() and good.read_bytes() == before


def test_weight_decay_spares_all_but_matrices():
    """What has two axes or more and is spared, in every paper. Of PyTorch's own layers, the matrices decay."""
    spared = {"dis": "A_log pos_embed label_embed.weight", "mdm": "source.weight", "cunet": "label.weight",
              "diffussm": "log_neg_A_real A_imag C b_down label_embed.weight"}
    for name, ends in spared.items():
        model, _ = checkpoint.load_paper(name).build("tiny", (1, 16, 16), 5)
        decayed = {id(p) for p in matrices(model)}
        assert all(p.ndim > 1 for p in matrices(model))
        left = {n for n, p in model.named_parameters() if p.ndim > 1 and id(p) not in decayed}
        for end in ends.split():
            assert any(n.endswith(end) for n in left), end
        assert all(n.endswith(tuple(ends.split())) for n in left)
    own = torch.nn.ModuleList([torch.nn.MultiheadAttention(4, 1), torch.nn.GRU(4, 4), torch.nn.LayerNorm((2, 4))])
    names = {id(p): n for n, p in own.named_parameters()}
    assert sorted(names[id(p)] for p in matrices(own)) == [
        "0.in_proj_weight", "0.out_proj.weight", "1.weight_hh_l0", "1.weight_ih_l0"]


# --- processes, accumulation, batches ---

def test_any_number_of_processes_with_and_without_shards_goes_on_from_any_other(tmp_path, monkeypatch):
    """A run goes from one process, with accumulation, to 4 with shards, on two machines that share no folder, and back
    to one. Its losses and all that it saves are those of one process. The model draws, too: which images skip a block.
    benchmarks/processes.py tries every model and every pair of ways."""
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other" / "relay" / "run"        # on the second machine, with a file of an old run
    other.mkdir(parents=True)
    (other / "latest.pt").write_bytes(b"old")
    flags = ["--ckpt-every", 5, "--log-every", 1, "--ema-decay", 0.5, "--lr-schedule", "constant",
             "--weight-decay", 2, *SMALL[2:6], "drop_path=0.5"]
    whole = run(tmp_path / "whole", *flags, "--max-steps", 20)
    ranks.need_shards()
    ways = [(1, "--grad-accum", 4), (4, "--shard", "--grad-accum", 2), (1,)]
    for i, (processes, *more) in enumerate(ways):
        now = [*flags, *more, "--max-steps", 7 * i + 6]
        if processes == 1:
            run(tmp_path / "relay", *now)
            continue
        ranks.launch(tmp_path / "said", processes, "train.py", *SMALL, "--results-dir", "relay", "--name", "run", *now,
                     machines={tmp_path: 2, tmp_path / "other": 2})
    assert [p.name for p in other.iterdir()] == ["latest.pt"]
    relay = torch.load(tmp_path / "relay" / "run" / "latest.pt", weights_only=True)
    for step, loss in losses(tmp_path / "whole").items():
        assert losses(tmp_path / "relay")[step] == pytest.approx(loss, abs=1e-5), step
    for part in ("model", "ema"):
        for k, v in whole[part].items():
            torch.testing.assert_close(relay[part][k], v, atol=2e-5, rtol=1e-4)
    for i, moments in whole["opt"]["state"].items():
        for k, v in moments.items():
            torch.testing.assert_close(relay["opt"]["state"][i][k], v, atol=1e-5, rtol=1e-3)


TIED = """
import torch, torch.distributed as dist
from support import parallel

class Tied(torch.nn.Module):
    unit = torch.nn.Linear

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = torch.nn.Conv2d(3, 3, 3), torch.nn.Conv2d(3, 3, 3), torch.nn.Linear(3, 5)
        self.b.weight, self.times = self.a.weight, torch.ones(2)
        self.register_buffer("counts", torch.arange(3))
        self.c.register_buffer("mask", torch.tensor([True, False]), persistent=False)

def tensors(net):
    return [(k, parallel.full(v).detach().clone()) for k, v in
            [*net.named_parameters(), *net.named_buffers(), ("times", net.times)]]

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh, sent, cpu = dist.init_device_mesh("cpu", (1,)), [], torch.device("cpu")
dist.broadcast = lambda x, source: sent.append(x.clone())
first = Tied().to(memory_format=torch.channels_last)
whole = tensors(first)
parallel.cut(first, mesh, cpu)
with torch.device("meta"):
    other = Tied().to(memory_format=torch.channels_last).requires_grad_(False)
dist.get_rank = lambda: 1
dist.broadcast = lambda x, source: x.copy_(sent.pop(0))
parallel.cut(other, mesh, cpu)
assert not sent and other.a.weight is other.b.weight and first.a.weight.requires_grad > other.a.weight.requires_grad
for found in (tensors(first), tensors(other)):
    for (name, x), (key, y) in zip(whole, found, strict=True):
        assert name == key and torch.equal(x, y), name
"""


def test_shards_need_the_numbers_of_the_first_process_only(tmp_path):
    """With what no paper's model has: a weight in two places, a buffer, one that no checkpoint has, a mere tensor."""
    ranks.launch(tmp_path / "said", 1, "-c", TIED)


def test_same_seed_same_image_at_any_batch_size(tmp_path):
    run(tmp_path, "--max-steps", 30, "--lr", "1e-2")
    model, diffusion, args = checkpoint.load_run(tmp_path / "run" / "latest.pt")
    seeds, cond = 5 + torch.arange(8), {"y": torch.arange(8)}
    images = [sample.generate(model, diffusion, tuple(args["shape"]), seeds, cond, size, "cpu",
                              progress=False, steps="5", cfg_scale=2.0) for size in (1, 3, 8)]
    assert images[0].std() > 0.05
    for other in images[1:]:
        torch.testing.assert_close(other, images[0], atol=1e-4, rtol=0)


def test_the_bar_of_sampling_counts_steps(monkeypatch):
    bars = []
    monkeypatch.setattr(sample, "tqdm", lambda real=sample.tqdm, **options: bars.append(real(**options)) or bars[0])
    sample.generate(lambda x, t: 0 * x, Diffusion(cosine_alpha_bar(20)), (1, 4, 4), torch.arange(3), {}, 2, "cpu",
                    steps="10,5")
    assert (bars[0].n, bars[0].total, bars[0].unit) == (30, 30, "step")


def test_fid_samples_are_the_same_bytes_whatever_the_number_of_processes(tmp_path, monkeypatch):
    run(tmp_path, "--max-steps", 2)
    flags = ["--ckpt", tmp_path / "run", "--num-fid-samples", 7, "--steps", 2, "--batch-size", 2]
    monkeypatch.chdir(tmp_path)
    said = ranks.launch(tmp_path / "said", 3, "sample.py", *flags, "--save-images", tmp_path / "three")
    npz = tmp_path / "three.npz"
    assert f"evaluator.py VIRTUAL_imagenet16_labeled.npz {npz}" in said
    three = npz.read_bytes()
    images = np.load(npz)["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (7, 16, 16, 3)
    names = sorted((tmp_path / "three").glob("*.png"))
    assert [p.name for p in names] == [f"00000{i}.png" for i in range(7)]
    assert np.array_equal(images[4], np.asarray(Image.open(names[4])))

    given, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *args, **more: given.append(args[3:5]) or generate(*args, **more))
    names[3].unlink()                                            # continues where it stopped
    (tmp_path / "three" / ".99.000003.png").write_bytes(b"killed")
    kept = names[2].stat().st_mtime_ns
    npz.unlink()
    sample.main([*map(str, flags), "--save-images", str(tmp_path / "three")])
    assert npz.read_bytes() == three
    assert names[2].stat().st_mtime_ns == kept and not list((tmp_path / "three").glob(".*"))
    (tmp_path / "three" / "000005.png").unlink()                 # 6 would be too many for 5
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", str(tmp_path / "run"), "--num-fid-samples", "5", "--steps", "2", "--batch-size", "2",
                     "--save-images", str(tmp_path / "three")])
    [(seeds, cond)] = given                                      # classes are drawn, not in turn
    assert seeds.tolist() == [2, 3] and torch.equal(cond["y"], fold(seeds, 8) % 8) and cond["y"].tolist() != [2, 3]


def test_the_printed_command_writes_the_real_images(tmp_path, monkeypatch, capsys):
    run(tmp_path, "--data", "moving", "--frames", 1, "--data-dir", tmp_path / "data", "--max-steps", 1)
    sample.main(["--ckpt", str(tmp_path / "run"), "--num-fid-samples", "1", "--steps", "1", "--save-images",
                 str(tmp_path / "fid")])
    command = next(line for line in capsys.readouterr().out.splitlines() if "support.prepare images" in line)
    given = []
    monkeypatch.setattr(prepare, "write_images", lambda dataset, folder: given.append(dataset.shape))
    prepare.main(shlex.split(command.split("#")[0])[3:])
    assert given == [(3, 16, 16)] and f"--data-dir {tmp_path / 'data'}" in command


class Looks(TorchDispatchMode):
    """Counts the operations that on a GPU would wait for it: to fetch a number, or a shape that depends on numbers."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero,
                                              torch.ops.aten.equal, torch.ops.aten.masked_select)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model, options", [
    ("dis", SMALL[2:6]), ("diffussm", ["--set", "width=16", "depth=2"]),
    ("mdm", ["--cond", "text", "--set", "side=8", "channels=(8,8)", "text_width=8", "embedding=8", "heads=2"]),
    ("cunet", ["--set", "nf=4", "gradients=checkpoint"])])          # torchdiffeq, the default, looks at each step
def test_between_log_lines_nothing_looks_at_a_number(tmp_path, monkeypatch, model, options):
    """The one look in each step is at the seed, which is on the CPU. To count multiply-adds before the first step may
    take more looks, so that is left out."""
    monkeypatch.setattr(cost, "multiply_adds", lambda *args: None)
    # this looks, but never at what is on a GPU: test_labels_without_numbers_are_not_looked_at
    monkeypatch.setattr(checkpoint.load_paper(model), "check_labels", lambda *args: None, raising=False)
    counts = []
    real = torch.Tensor.tolist                              # does not tell the dispatcher
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (x.sum().item(), real(x))[1])
    for steps in (4, 10):
        with Looks() as looks:
            train.main([*SMALL[:2], *SMALL[6:], "--model", model, *options, "--max-steps", str(steps), "--log-every",
                        "100", "--results-dir", str(tmp_path), "--name", str(steps), "--lr-schedule", "constant"])
        counts.append(looks.count)
    # the last log line looks at the losses and norms of all steps at once
    assert counts[1] - counts[0] == 6, counts


def test_compiled_sampling_is_one_graph_that_no_step_waits_in(tmp_path, monkeypatch):
    """What CUDA graphs need: the same shapes at every step, and no look at a number in between."""
    run(tmp_path, "--max-steps", 1)
    graphs, looks, compile = [], [], torch.compile

    def count(graph, example):
        graphs.append(graph)
        return graph
    monkeypatch.setattr(torch, "compile", lambda net, mode: compile(net, backend=count, fullgraph=True))

    def draw(*flags):
        path = tmp_path / "a.png"
        sample.main(["--ckpt", str(tmp_path / "run"), "--num-samples", "8", "--out", str(path),
                     "--device", "cpu", "--cfg-below", "1", *flags])
        return np.asarray(Image.open(path))
    compiled = draw("--steps", "8", "--compile")
    assert len(graphs) == 1
    for steps in (4, 8):
        with Looks() as counter:
            picture = draw("--steps", str(steps))
        looks.append(counter.count)
    assert looks[0] == looks[1]
    assert np.array_equal(compiled, picture)
    rough = draw("--steps", "8", "--precision", "bf16").astype(int)
    assert 0 < np.abs(rough - picture).mean() < 2           # of 255


def test_overfit_one_batch(tmp_path):
    run(tmp_path, "--overfit-one-batch", "--max-steps", 80, "--log-every", 10, "--lr", "5e-3",
        "--global-batch-size", 4, "--image-size", "8")
    curve = losses(tmp_path)
    assert curve[10] > 0.3 and curve[80] < 0.05


def test_a_latent_is_drawn_apart_from_the_noise_on_it():
    """Tells what is wrong if both draws come from one counter."""
    ones = np.concatenate([np.zeros((2, 4, 8, 8)), np.ones((2, 4, 8, 8))], 1, dtype=np.float16)     # means, then stds
    dataset = datasets.Dataset("latents", (4, 8, 8), ones, 2, latents={"shift": 0, "scale": 1})
    args = SimpleNamespace(hflip=False, cond_dropout=0, num_classes=0)
    z, _, noise, _ = train.make_batch(dataset[[0, 1]], torch.arange(2), dataset, Diffusion(cosine_alpha_bar(10)), args,
                                      None, torch.device("cpu"))
    assert torch.corrcoef(torch.stack([z.flatten(), noise.flatten()]))[0, 1].abs() < 0.15


@pytest.mark.parametrize("space", [None, {"vae": "none", "scale": 1, "shift": 0, "data": "x"}])
def test_pictures_are_clipped_and_latents_are_not(tmp_path, monkeypatch, space):
    """By the grids of train.py and by sample.py. Both take all T steps if there are few."""
    seen = []

    class Asked(Diffusion):
        def sample(self, model, shape, seeds, clip, steps, **options):
            seen.append((clip, steps))
            return torch.zeros(len(seeds), *shape)
    trained = {"shape": [4, 8, 8], "num_classes": 0, "cond_dropout": 0, "space": space, "prompts": [],
               "class_names": []}
    diffusion = Asked(cosine_alpha_bar(20))
    monkeypatch.setattr(checkpoint, "load_run", lambda *args: (None, diffusion, trained))
    sample.preview(None, diffusion, SimpleNamespace(**trained), None, None, "cpu")
    sample.main(["--ckpt", "run", "--out", str(tmp_path / "a.png"), *["--vae", "none"] * bool(space)])
    assert seen == [(not space, "20")] * 2


def test_the_newest_run_is_the_one_written_last(tmp_path):
    for name, age in ("a", 3), ("b", 1), ("c", 2):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latest.pt").touch()
        os.utime(tmp_path / name / "latest.pt", (0, 100 - age))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "b" / "latest.pt"


# --- what is written ---

def test_run_folder_describes_itself(tmp_path):
    run(tmp_path, "--max-steps", 4, "--log-every", 2, "--sample-every", 2, "--ckpt-every", 2)
    folder = tmp_path / "run"
    with open(folder / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [int(r["step"]) for r in rows] == [2, 4] and [int(r["images"]) for r in rows] == [16, 32]
    assert all(float(r["grad_norm"]) > 0 and float(r["images_per_s"]) > 0 for r in rows)
    assert any(r["loss_t0"] for r in rows) and any(r["loss_t4"] for r in rows)
    assert '"command"' in (folder / "args.json").read_text()
    assert [p.name for p in (folder / "samples").iterdir()] == ["step_0000002.png"]
    assert Image.open(folder / "samples.png").size[0] > 100
    assert len(list((folder / "checkpoints").iterdir())) == 2       # --keep-ckpts 2
    assert Image.open(folder / "summary.png").size[0] == 1000


def test_the_summary_shows_lines_and_grids(tmp_path, capsys):
    """A band has no loss in some rows, and of many grids a few are shown. A summary that fails ends nothing."""
    rows = ["step,loss,loss_t0,loss_t1,loss_t2,loss_t3,loss_t4", *(f"{s},1,.8,.5,.2,,{2 / s}" for s in (10, 20, 1000))]
    (tmp_path / "log.csv").write_text("\n".join(rows))
    log.summarise(tmp_path)
    plain = Image.open(tmp_path / "summary.png")
    shades = {colour for _, colour in plain.crop((60, 30, 800, 296)).getcolors(10**6)}         # without the words
    assert [Image.new("RGB", (1, 1), s).getpixel((0, 0)) in shades for s in SHADES] == [True] * 5 + [False]
    (tmp_path / "samples").mkdir()
    for i, s in enumerate((100, 500, 1000, 1500, 2000, 2500)):
        Image.new("L", (90, 60), 9 + i).save(tmp_path / "samples" / f"step_{s:07d}.png")
    Image.new("RGB", (90, 60), "red").save(tmp_path / "samples.png")
    log.summarise(tmp_path, tmp_path / "samples.png")
    sheet = np.asarray(Image.open(tmp_path / "summary.png"))[plain.height + 60]
    assert [pixel.tolist() for pixel in sheet[95:1000:200]] == [[9 + i] * 3 for i in (0, 1, 2, 5)] + [[255, 0, 0]]
    log.summarise(tmp_path / "gone")
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["summary"] * 3 and "gone/log.csv" in said[2]


def test_the_time_to_the_end_counts_the_grids(tmp_path, monkeypatch):
    """A step takes a second, and every 20 steps a grid takes 40: three seconds a step. What is no terminal gets a line
    every 30 seconds, also if training becomes slow."""
    now, stderr = [0.0], io.StringIO()
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stderr)
    args = train.parse(["--max-steps", "120", "--sample-every", "20"])
    record = log.Log(args, tmp_path, parallel.Team(torch.device("cpu")), None, 10, 20)
    for step in range(21, 120):
        now[0] += 1 if step < 111 else 31
        record.step(torch.ones(()))
        if step == 22:
            assert "[00:02, 01:38 left]" in str(record.bar)
        if step % 20 == 0:
            with record.pause():
                now[0] += 40
        if step == 65:
            assert record.bar.format_dict["rate"] == pytest.approx(1 / 3)
    record.bar.close()
    lines = stderr.getvalue().rstrip("\n").split("\n")
    assert [int(re.search(r"(\d+)/120", line)[1]) for line in lines] == [20, 50, 80, *range(110, 120), 119]
    assert lines[1].endswith(" [01:10, 03:30 left]") and "\r" not in stderr.getvalue()


def test_defaults_of_a_preset(tmp_path):
    """TRAINING in a model's file, for one preset: before the defaults of train.py, after what is typed."""
    model = tmp_path / "own.py"
    model.write_text("CONFIGS = dict(tiny={}, mini={})\nbuild = dict\n"
                     "TRAINING = dict(mini=dict(lr=1.0, max_steps=7))\n")
    for typed, found in ("", (5000, 0.002)), ("--preset mini", (7, 1)), ("--lr 3 --preset mini", (7, 3)):
        args = train.parse(["--model", str(model), *typed.split()])
        assert (args.max_steps, args.lr) == found
    for paper in "dis", "diffussm", "mdm", "cunet":         # no preset and no flag that does not exist
        module = checkpoint.load_paper(paper)
        for preset, own in getattr(module, "TRAINING", {}).items():
            assert preset in module.CONFIGS and own.keys() <= vars(args).keys()


def test_the_loss_to_expect(tmp_path, monkeypatch, capsys):
    """Of a run of ours with the same flags, while its batch and rate were these. Far above it, one sentence."""
    for typed in log.RUNS:
        args, known = train.parse(typed.split()), log.expected(typed.split(), train.parse)
        if args.preset == "tiny":               # the log is of the same number of steps, and of as many images
            assert known[-1][:2] == (args.max_steps, args.max_steps * args.global_batch_size)
    monkeypatch.setattr(log, "ASSETS", tmp_path)
    rows = [f"{s},{32 * s},{1 / s},0.002" for s in (100, 450, 500, 550, 600)]
    (tmp_path / f"{log.RUNS['--model mdm']}.csv").write_text("\n".join(["step,images,loss,lr", *rows]))
    for flags, known in (("--model dis", 0), ("--lr 1", 0), ("--set side=8", 0), ("--cond text", 0), ("--seed 3", 5)):
        assert len(log.expected(["--model", "mdm", *flags.split()], train.parse)) == known, flags
    args = train.parse(["--model", "mdm"])
    record = log.Log(args, tmp_path, parallel.Team(torch.device("cpu")), None, 10, 499,
                     log.expected(["--model", "mdm"], train.parse))
    mean = (1 / 450 + 1 / 500 + 1 / 550) / 3
    assert record.usual(500, 0.00195) == pytest.approx(mean) and record.usual(300, 0.002) is None
    assert record.usual(500, 0.0018) is None
    record.since = 449
    assert record.usual(500, 0.00195) is None               # ours are means of 50 steps
    record.since = 499
    capsys.readouterr()
    for step, loss, told in (500, 1.9, 0), (499, 2.1, 0), (500, 2.1, 1), (500, 2.1, 0):         # once
        record.loss(torch.tensor([loss * mean]), torch.tensor([0]))
        record.step(torch.ones(()))
        record.write(step, 0.002)
        assert "(expect 0.002" in record.bar.postfix
        said = capsys.readouterr()
        assert said.out.count("the same command gave us 0.002 here") == told == said.err.count("expect")
    args.global_batch_size = 64
    assert record.usual(500, 0.002) is None


@pytest.mark.parametrize("flags, denoises", [
    ("", True), ("--num-classes 0", True), ("--cond-dropout 0", False), ("--resume none --max-steps 7", True),
    ("--set T=99", False),
    ("--image-size 8", False), ("--model mdm", False), ("--model mdm --cond text --max-steps=7", False),
    ("--model mdm --data moving --preset tiny-video", False), ("--model examples/mypaper.py --data pets", False)])
def test_what_to_try_next_can_be_tried(monkeypatch, flags, denoises):
    monkeypatch.chdir(ROOT)
    argv = flags.split()
    args = train.parse(argv)
    C, size = 3, int(args.image_size or 32)
    args.shape, args.space, args.options = [C, *[8] * ("moving" in argv), size, size], None, {"T": 1000, **args.set}
    args.text, args.prompts = 5 * ("text" in argv), ["a red star"] * ("text" in argv)
    args.num_classes = 0 if args.num_classes == 0 or args.text else 8
    words = [shlex.split(line) for line in log.further(args, Path("a run"), argv, 1).splitlines()]
    assert [w[0] for w in words] == ["film", *["denoise"] * denoises, "longer"]
    diffusion = SimpleNamespace(T=1000, respaced=lambda steps: None)
    for _, python, program, *given in words:
        if program == "sample.py":
            asked = sample.parse(given)
            sample.check_flags(asked)
            sample.check_model(asked, None, diffusion, vars(args))
            assert asked.ckpt == "a run"
            assert asked.model == (args.model if args.model.endswith(".py") else None)
        else:
            again, told = train.parse(given), [word for word in given if word.startswith("--max-steps")]
            assert again.max_steps == 2 * args.max_steps and again.resume == "auto" and len(told) == 1
    assert len(log.further(args, Path("a run"), argv, 2).splitlines()) == 1 + denoises          # torchrun


@pytest.mark.parametrize("terminal", [False, True])
def test_a_path_is_a_link_in_a_terminal(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: terminal))
    monkeypatch.setenv("TERM", "xterm")
    path = Path("my run/a.png")
    assert log.link(path) == (f"\033]8;;{path.resolve().as_uri()}\033\\{path}\033]8;;\033\\" if terminal else str(path))


def test_grid_puts_each_class_in_its_row():
    images = np.zeros((6, 8, 8, 1), np.uint8)
    images[[1, 4]] = 200                                            # class 1 of 3
    sheet = np.asarray(grid_image(images, 3, zoom=1))
    assert sheet.shape == (30, 20)
    assert (sheet[11:19, [1, 8, 11, 18]] == 200).all() and not (sheet[1:9, 1:9]).any()


@pytest.mark.parametrize("pictures, rows", [(1000, 10), (1000, 1), (999, 4), (300, 300)])
def test_a_large_grid_is_wrapped_into_the_shape_of_a_screen(pictures, rows):
    """Each row's pictures stay together, in order, under its name."""
    images = np.arange(pictures).astype(np.uint8).reshape(-1, 1, 1, 1).repeat(30, 1).repeat(30, 2)
    grid = grid_image(images, rows, zoom=2)
    assert 1 < grid.width / grid.height < 2.2
    seen = np.asarray(grid)[32::64, 32::64].T                       # the middle of each cell, (columns, lines)
    if rows < 300:
        high = seen.shape[1] // rows
        for r in range(rows):
            block = seen[:, r * high:(r + 1) * high].T.flatten()
            assert np.array_equal(block[:len(images[r::rows])], images[r::rows, 0, 0, 0])
    else:
        assert np.array_equal(seen.flatten()[:300], images[:, 0, 0, 0])
    assert grid_image(images, rows, zoom=2, wrap=False).size == (64 * -(-pictures // rows), 64 * rows)


def test_gif_and_single_images(tmp_path):
    run(tmp_path, "--max-steps", 2)
    sample.main(["--ckpt", str(tmp_path / "run"), "--num-samples", "3", "--steps", "4", "--gif",
                 "--class-labels", "2", "--out", str(tmp_path / "a.png"),
                 "--save-images", str(tmp_path / "each")])
    assert Image.open(tmp_path / "a.gif").n_frames >= 4
    assert sorted(p.name for p in (tmp_path / "each").iterdir()) == [f"00000{i}.png" for i in range(3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_gray_pictures_without_classes(tmp_path, workers):
    """A folder, one channel, not square, unconditional; batches from worker processes are the same."""
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        Image.new("L", (24, 16), 50 * i).save(tmp_path / "pictures" / f"{i}.png")
    where = ["--data", tmp_path / "pictures", "--image-size", "16x24", "--hflip"]
    checkpoint = run(tmp_path, *where, "--max-steps", 3, "--num-workers", workers)
    assert checkpoint["args"]["shape"] == [1, 16, 24] and checkpoint["args"]["num_classes"] == 0
    plain = run(tmp_path / "plain", *where, "--max-steps", 3)
    assert same(plain["model"], checkpoint["model"])
    sample.main(["--ckpt", str(tmp_path / "run"), "--steps", "3", "--num-samples", "6",
                 "--out", str(tmp_path / "grid.png")])
    assert Image.open(tmp_path / "grid.png").mode == "L"


def test_a_model_of_your_own_is_one_file(tmp_path, capsys):
    (tmp_path / "mine.py").write_text('''
import torch
from diffusion import Diffusion, cosine_alpha_bar

class Mine(torch.nn.Module):
    def __init__(self, C, width):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Conv2d(C, width, 3, padding=1), torch.nn.SiLU(),
                                       torch.nn.Conv2d(width, C, 3, padding=1))
    def forward(self, x, t, y=None):
        return self.net(x)

CONFIGS = {"tiny": dict(width=8)}

def build(preset, shape, num_classes=0, **options):
    return Mine(shape[0], **(CONFIGS[preset] | options)), Diffusion(cosine_alpha_bar(1000), "v")
''')
    train.main(["--model", str(tmp_path / "mine.py"), "--set", "width=4", "--max-steps", "3",
                "--image-size", "8", "--global-batch-size", "4", "--device", "cpu", "--sample-every", "0",
                "--results-dir", str(tmp_path), "--num-classes", "0"])
    draw = ["--ckpt", str(tmp_path / "mine-shapes"), "--steps", "3", "--num-samples", "4",
            "--out", str(tmp_path / "mine.png")]
    with pytest.raises(SystemExit):                     # not because a checkpoint says so
        sample.main(draw)
    assert "if you trust it, pass --model" in capsys.readouterr().err
    sample.main([*draw, "--model", str(tmp_path / "mine.py")])
    assert Image.open(tmp_path / "mine.png").size[0] > 50


def test_dry_run_plans_and_writes_nothing(tmp_path, capsys):
    train.main(["--dry-run", "2", "--model", "diffussm", "--results-dir", str(tmp_path / "results")])
    out = capsys.readouterr().out
    assert "sharded, checkpointing" in out and f"threads {torch.get_num_threads()} of " in out
    assert "photographs" not in out and not (tmp_path / "results").exists()
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    train.main(["--dry-run", "1", "--data", str(tmp_path)])
    assert "expect      blotches of colour if these are photographs" in capsys.readouterr().out
    train.main(["--dry-run"])
    assert "GiB" not in capsys.readouterr().out


def test_the_recipes_start(tmp_path, monkeypatch, capsys):
    """Each as typed, with --dry-run 8 in place of torchrun, on data of the right kind. Their memory is not counted:
    that would take minutes, and test_cost.py does so for smaller ones; nor are multiply-adds, for which each paper has
    tests of its own."""
    text = (ROOT / "docs/scaling.md").read_text().split("## The papers' recipes")[1].split("```")[1]
    commands = [shlex.split(c) for c in re.findall(r"train\.py (.*)", text.replace("\\\n", " "))]
    assert {c[c.index("--preset") + 1] for c in commands} == {"DiS-H/2", "DiffuSSM-XL", "paper-256", "cunet"}
    monkeypatch.chdir(tmp_path)
    for kind in range(3):
        folder = tmp_path / f"path/to/imagenet/train/{kind}"
        folder.mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(folder / "a.png")
    (tmp_path / "path/to/celeba").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "path/to/celeba/a.png")
    (tmp_path / "latents-256").mkdir()
    latents.put(tmp_path / "latents-256" / "00000.npy", np.zeros((3, 8, 32, 32), np.float16))
    latents.put(tmp_path / "latents-256" / "labels.npy", np.arange(3))
    latents.put(tmp_path / "latents-256" / "latents.json", json.dumps(
        {"vae": "x", "scale": 0.18215, "shift": 0.0, "data": "imagenet", "images": 3, "copies": 1,
         "chunk": 1024, "shape": [4, 32, 32], "image_shape": [3, 256, 256],
         "class_names": [str(i) for i in range(1000)],
         "labels": datasets.digest(np.arange(3).astype("<i8").tobytes())}))
    monkeypatch.setattr(cost, "table", lambda *args: [{"name": "nothing", "total": 0}])
    monkeypatch.setattr(cost, "multiply_adds", lambda *args: None)
    for command in commands:
        train.main([*command, "--dry-run", "8"])
    out = capsys.readouterr().out
    for says in ("906,966,560", "668,878,864", "mdm paper-256", "7,674,915", "8 processes"):
        assert says in out
    assert not (tmp_path / "results").exists()


# --- weights to share ---

def test_weights_to_share(tmp_path, capsys):
    """The averaged weights in half precision draw nearly the same pictures, say nothing of the machine, and can begin
    another run."""
    run(tmp_path, "--max-steps", "3", "--data-dir", str(tmp_path))
    whole, slim = tmp_path / "run" / "latest.pt", tmp_path / "slim.pt"
    saved = torch.load(whole, weights_only=True)
    torch.save({**saved, "args": {**saved["args"], "vae": str(tmp_path)}}, whole)
    checkpoint.main([str(tmp_path / "run"), str(slim)])
    assert slim.stat().st_size < whole.stat().st_size / 4
    for itself in whole, tmp_path / "run" / "checkpoints" / "0000003.pt":
        with pytest.raises(SystemExit):
            checkpoint.main([str(tmp_path / "run"), str(itself)])
        assert "would be replaced" in capsys.readouterr().err and checkpoint.read(itself)["opt"]
    assert str(tmp_path) not in repr(checkpoint.read(slim)["args"])
    raw, ema, half = *(checkpoint.read(whole)[w] for w in ("model", "ema")), checkpoint.read(slim)["model"]
    assert same(half, {k: v.half() for k, v in ema.items()}) and not same(raw, ema)
    out, pictures = tmp_path / "a.png", []
    for path in (whole, slim):
        sample.main(["--ckpt", str(path), "--num-samples", "4", "--steps", "3", "--out", str(out)])
        pictures.append(np.asarray(Image.open(out)).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 3
    train.main([*SMALL, "--results-dir", str(tmp_path), "--name", "more", "--resume", str(slim), "--max-steps",
                "5"])
    assert "resumed     at step 3, with a new optimizer" in capsys.readouterr().out
    assert checkpoint.read(tmp_path / "more/latest.pt")["step"] == 5
