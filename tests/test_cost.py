"""support/cost.py: counts checked by hand and against a real pass, and the arithmetic of its table."""
import pytest
import torch
from torch import nn

from support import cost, scan
from support.checkpoint import load_paper

N, D, H = 64, 32, 256


class Sum:
    """A diffusion whose loss keeps nothing: all that is counted is the model's."""

    def loss(self, model, x0):
        return {"loss": model(x0).sum(1)}


class Block(nn.Sequential):
    pass


class Blocks(nn.Sequential):
    unit = Block


def block():
    return Block(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))


def on_meta(make):
    with torch.device("meta"):
        return make()


def tiny(paper, size, **options):
    name, preset, shape, kind = {
        "dis": ("dis", "tiny", (3, 16, 16), {"num_classes": 4}),
        "diffussm": ("diffussm", "tiny", (1, 16, 16), {"num_classes": 4}),
        "mdm": ("mdm", "tiny", (3, 32, 32), {"text": "bytes"}),
        "mdm-16": ("mdm", "tiny", (3, 16, 16), {"num_classes": 4}),
        "cunet": ("cunet", "tiny", (1, 16, 16), {})}[paper]
    module = load_paper(name)
    if name in ("dis", "diffussm"):
        options["depth"] = 2
    model, diffusion = on_meta(lambda: module.build(preset, shape, **kind, **options))
    return model, diffusion, cost.blank_batch(diffusion, shape, size, **kind)


# --- multiply-adds -----------------------------------------------------------------------------------

def test_multiply_adds_by_hand():
    x0 = {"x0": torch.empty(1, D, device="meta")}
    model = on_meta(block)
    assert cost.multiply_adds(model, Sum(), x0) == 2 * D * H and model[0].weight.is_meta

    class Attention(nn.Module):                             # N queries and keys, D wide, two heads
        def forward(self, x):
            q = x.view(1, 2, N, D // 2)
            return nn.functional.scaled_dot_product_attention(q, q, q).flatten(1)
    x0 = {"x0": torch.empty(1, N * D, device="meta")}
    assert cost.multiply_adds(Attention(), Sum(), x0) == 2 * N * N * D
    assert cost.multiply_adds(*tiny("cunet", 1, solver="dopri5")) is None       # chooses its steps by numbers


# --- bytes -------------------------------------------------------------------------------------------

def test_by_hand():
    """The peak is in the backward of the second layer. Alive then, in numbers: input and output of GELU and the
    gradient of its output, (N, H) each; the layer's gradients on their way; the losses, their mean, its gradient."""
    count = cost.activations(on_meta(block), Sum(), {"x0": torch.empty(N, D, device="meta")}, False)
    assert count == 4 * (3 * N * H + (H * D + D) + N + 2)


def test_views_in_place_and_temporaries():
    with cost.Tracker() as tracker:
        x = torch.empty(1000)                               # 4000 bytes
        view = x.view(10, 100)[2:].mul_(2)
        assert tracker.now == tracker.peak == 4000
        (x + 1).exp()                       # two temporaries: the first dies when the second is there
        assert (tracker.now, tracker.peak) == (4000, 12000)
        del x
        assert tracker.now == 4000                          # the view keeps it alive
        del view
        assert tracker.now == 0
    known = torch.empty(1000)
    with cost.Tracker([known]) as tracker:
        known.view(-1).add_(1)
        assert tracker.peak == 0


def test_checkpointing_and_batches():
    model = on_meta(lambda: Blocks(*(block() for _ in range(6))))

    def count(n, checkpointing=False):
        batch = {"x0": torch.empty(n, D, device="meta")}
        return cost.activations(model, Sum(), batch, False, checkpointing)
    # six blocks keep the input and output of GELU; all but the first, whose input is the batch, keep theirs
    assert count(N) > 4 * N * (6 * 2 * H + 5 * D)
    assert count(N, True) < 6 * N * D * 4 + N * (4 * H + 2 * D) * 4
    assert count(64 * N) / count(32 * N) == pytest.approx(2, rel=0.02)
    assert all(p.grad is None for p in model.parameters())


def test_bf16_as_on_cuda():
    """Autocast gives the results of norms and softplus in float32 on CUDA, and in bf16 on the CPU."""
    model = on_meta(lambda: nn.Sequential(nn.Linear(D, H, bias=False), nn.Softplus()))
    batch = {"x0": torch.empty(N, D, device="meta")}
    cpu, cuda, fp32 = (cost.activations(model, Sum(), batch, bf16, device=device)
                       for bf16, device in ((True, "cpu"), (True, "cuda"), (False, "cuda")))
    assert cpu < fp32 and cuda > cpu + N * H * 2


@pytest.mark.parametrize("paper", ["dis", "diffussm", "mdm", "cunet"])
def test_papers(paper):
    model, diffusion, batch = tiny(paper, 4)
    plain = cost.activations(model, diffusion, batch, True)
    assert plain > 2**18
    assert cost.activations(model, diffusion, batch, True, True) < 0.75 * plain


@pytest.mark.parametrize("paper", ["dis", "diffussm", "mdm-16"])
def test_real_tensors(paper, monkeypatch):
    """The same tracker around a pass that does compute: numbers change nothing."""
    class Other(torch.Tensor):  # on a plain tensor of the CPU DiS takes a shortcut
        pass

    def new(count, u, A):       # as on a GPU: there a scan's memory is not kept for the next one
        rows, T = scan.block_size(u, A)
        return u.new_empty(count, rows, min(T, u.shape[1]), *A.T.shape)
    monkeypatch.setattr(scan, "work_arrays", new)
    model, diffusion, batch = tiny(paper, 2)
    guess = cost.activations(model, diffusion, batch, False, device="cpu")
    batch = {k: torch.ones(v.shape, dtype=v.dtype).as_subclass(Other) for k, v in batch.items()}
    model = model.to_empty(device="cpu").train()
    for p in model.parameters():
        nn.init.constant_(p, 0.01)
        p.grad = torch.zeros_like(p)
    for b in model.buffers():
        b.zero_()
    diffusion.loss(model, **batch)                          # makes the tables of the diffusion, once
    known = [*model.parameters(), *(p.grad for p in model.parameters()), *model.buffers(), *batch.values()]
    with cost.Tracker(known, bodies=cost.operators(model)) as tracker:
        diffusion.loss(model, **batch)["loss"].mean().backward()
    assert guess == pytest.approx(tracker.peak, rel=0.02)


def test_adaptive_solvers_are_refused():
    with pytest.raises(ValueError, match="an adaptive solver"):
        cost.activations(*tiny("cunet", 2, solver="dopri5"), False)


# --- the table ---------------------------------------------------------------------------------------

def test_table():
    model = on_meta(lambda: Blocks(*(block() for _ in range(6)), nn.Linear(D, D, bias=False)))
    batch = {"x0": torch.empty(N, D, device="meta")}
    unit, root = 4 * (2 * D * H + H + D), 4 * D * D
    P = 6 * unit + root
    ddp, ddp_less, shard, shard_less = cost.table(model, Sum(), batch, 4, False)
    assert [ddp[k] for k in ("weights", "gradients", "optimizer", "ema")] == [P, P, 2 * P, P]
    assert shard["weights"] == P / 4 + root + 3 * unit and shard["gradients"] == P / 4 + root + 2 * unit
    assert (shard["optimizer"], shard["ema"]) == (P / 2, P / 4)
    assert shard["activations"] == ddp["activations"] > ddp_less["activations"] == shard_less["activations"]
    for row in (ddp, ddp_less, shard, shard_less):
        parts = ("weights", "gradients", "optimizer", "ema", "activations")
        assert row["total"] == sum(row[k] for k in parts)
    assert [row["name"] for row in cost.table(model, Sum(), batch, 1, False)] == [
        "one GPU", "one GPU, checkpointing"]


def test_report_marks_what_does_not_fit():
    row = dict(weights=2**30, gradients=2**30, optimizer=2**31, ema=2**30)
    rows = [{"name": name, **row, "activations": a, "total": 5 * 2**30 + a}
            for name, a in (("DDP", 74 * 2**30), ("sharded", 68 * 2**30))]
    lines = cost.report(rows).splitlines()
    assert lines[1].split() == ["DDP", "1.00", "1.00", "2.00", "1.00", "74.00", "79.00", "does", "not", "fit"]
    assert lines[2].split()[-1] == "73.00" and "73.6 GiB" in lines[3]
    assert len(lines[0]) == len(lines[2])
