"""Everything a user can get wrong gives one sentence with the fix, exit code 2 and no traceback. All files stay as they
are."""
import gzip
import hashlib
import os
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from diffusion import UserError
from support import checkpoint, cli, cost, datasets, inside, pictures, prepare

SMALL = ["--image-size", "16", "--set", "width=32", "depth=2", "state=4", "--global-batch-size", "8",
         "--max-steps", "2", "--sample-every", "0", "--device", "cpu"]
MDM = ["--model", "mdm", "--set", "channels=(4,4)", "text_width=8", "embedding=8", "heads=2", *SMALL[:2],
       *SMALL[-8:]]
TRAIN, SAMPLE, DATA = train.main, sample.main, prepare.main


def idx(array):
    """A numpy uint8 array as a gzipped idx file."""
    return gzip.compress(struct.pack(">HBB", 0, 8, array.ndim)
                         + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


@pytest.mark.parametrize("main, flags", [(TRAIN, []), (SAMPLE, []), (DATA, ["images"])])
def test_help_shows_each_default_once_and_none_that_is_none(main, flags, capsys):
    with pytest.raises(SystemExit):
        main([*flags, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "None" not in said and not re.search(r"\(default[^-]*\(default", said)
    assert main is DATA or "(default: 0)" in said


class Code:
    def __reduce__(self):
        return os.system, ("echo executed > executed",)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with one good run and many bad files. Every test runs in it and must leave it as it is."""
    root = tmp_path_factory.mktemp("world")
    monkeypatch = pytest.MonkeyPatch()                  # to count takes longer than two steps
    monkeypatch.setattr(cost, "multiply_adds", lambda *args: None)
    monkeypatch.chdir(root)
    train.main([*SMALL, "--results-dir", "results", "--name", "run"])
    train.main([*SMALL, "--results-dir", "other", "--name", "unconditional", "--num-classes", "0"])
    good = Path("results/run/latest.pt").read_bytes()
    checkpoint = torch.load("results/run/latest.pt", weights_only=True)

    def changed(name, **changes):
        torch.save({**checkpoint, **changes}, name)
    changed("version.pt", version=99)
    changed("misfit.pt", args={**checkpoint["args"], "options": {**checkpoint["args"]["options"], "width": 64}})
    changed("own.pt", args={**checkpoint["args"], "model": "paper.py"})
    changed("stranger.pt", args={**checkpoint["args"], "model": "gone"})
    changed("folder.pt", args={**checkpoint["args"], "data": "mixed"})
    changed("always.pt", args={**checkpoint["args"], "cond_dropout": 0.0})
    train.main([*SMALL, "--results-dir", "other", "--name", "small", "--image-size", "8"])
    os.replace("other/small/latest.pt", "small.pt")
    for name, flags in (("words", []), ("clips", ["--preset", "tiny-video", "--data", "moving"]),
                        ("deaf", ["--cond-dropout", "0"])):
        train.main([*MDM, "--cond", "text", "--results-dir", "other", "--name", name, *flags])
    words = torch.load("other/words/latest.pt", weights_only=True)["args"]
    reader, _ = train.checkpoint.load_paper("mdm").build("tiny", tuple(words["shape"]), text=24, **words["set"])
    changed("t5.pt", ema=reader.state_dict(), args={**words, "text": 24, "text_encoder": "some/t5"})
    torch.save({"weights": torch.ones(2)}, "alien.pt")
    torch.save({"version": 1, "model": Code(), "ema": {}, "args": {}}, "code.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Code()))
    Path("half.pt").write_bytes(good[:len(good) // 2])
    Path("empty.pt").write_bytes(b"")
    Path("cut/run").mkdir(parents=True)
    Path("cut/run/latest.pt").write_bytes(good[:len(good) // 2])

    Path("file").write_text("not a folder")
    Path("nothing").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (20, 28, 28), dtype=np.uint8)
    for name, images, labels in (
            ("empty-mnist", b"", idx(np.zeros(20, np.uint8))),
            ("cut-mnist", idx(pixels)[:2000], idx(np.zeros(20, np.uint8))),
            ("swapped-mnist", idx(np.zeros(20, np.uint8)), idx(pixels)),
            ("short-mnist", idx(pixels), idx(np.zeros(19, np.uint8)))):
        Path(name).mkdir()
        Path(name, "train-images-idx3-ubyte.gz").write_bytes(images)
        Path(name, "train-labels-idx1-ubyte.gz").write_bytes(labels)
    Path("cut-cifar/cifar-10-batches-bin").mkdir(parents=True)
    for i in range(1, 6):
        Path(f"cut-cifar/cifar-10-batches-bin/data_batch_{i}.bin").write_bytes(b"\1" * 5000)
    for name in ("corrupt", "mixed", "caption", "gap"):
        Path(name).mkdir()
        for i in range(3):
            size = (16 + 4 * i * (name == "mixed"),) * 2
            Image.new("RGB", size, (9 * i, 0, 0)).save(f"{name}/{i}.png")
    Path("corrupt/1.png").write_bytes(Path("corrupt/1.png").read_bytes()[:40])
    Path("caption/metadata.csv").write_text("picture,words\n0.png,red\n")
    Path("gap/metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n2.png,c\n7.png,d\n")
    Path("paper.py").write_text("WIDTH = 3\n")
    Path("typo.py").write_text("CONFIGS = dict(tiny={})\nTRAINING = dict(tiny=dict(max_step=3))\ndef build(): pass\n")
    Path("tiny.py").write_text("CONFIGS = dict(tiny={})\ndef build(): pass\n")
    Path("odd.py").write_text("""
import numpy, torch
from diffusion import Diffusion, cosine_alpha_bar
CONFIGS = {"tiny": {"gain": numpy.float64(2)}}
def build(preset, shape, num_classes=0, **options):
    return torch.nn.Linear(1, 1), Diffusion(cosine_alpha_bar(10))
""")
    Path("mirror").mkdir()
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        Path("mirror", name).write_bytes(b"not what was asked for")
    Path("fid").mkdir()
    Path("fid/settings.json").write_text('{"ckpt": "another"}')
    Image.new("RGB", (8, 8)).save("fid/000000.png")
    monkeypatch.undo()
    return root


def tree():
    return {str(p): hashlib.md5(p.read_bytes()).hexdigest() for p in Path().rglob("*") if p.is_file()}


def new(*flags):
    return [*SMALL, "--results-dir", "new", *flags]


CKPT = ["--ckpt", "results/run"]
FROM_5 = ["--from-step", "5", "--denoise"]
WRONG = [
    # model and options
    (TRAIN, new("--model", "nosuch"), "choose .*dis"),
    (TRAIN, new("--model", "paper.py"), "must define CONFIGS and build"),
    (TRAIN, new("--model", "train"), "choose .*dis"),
    (TRAIN, new("--preset", "DiS-Z/2"), "DiS-S/2"),
    (TRAIN, new("--set", "skip=residual"), "concat or add or none"),
    (TRAIN, new("--set", "colour=3"), "dis has .*width"),
    (TRAIN, new("--set", "skip"), "KEY=VALUE"),
    (TRAIN, new("--set", "width={1,2}"), r"such as width=\[1,2\]"),
    (TRAIN, new("--set", "patch=0"), "whole number, at least 1"),
    (TRAIN, new("--set", "width=abc"), "whole number, at least 1"),
    (TRAIN, new("--set", "label_std=x"), "must be a number"),
    (TRAIN, new("--seed", "99999999999999999999"), "at least 0"),
    (TRAIN, new("--smoke", "--dry-run"), "drop"),
    (TRAIN, new("--device", "cpu:x"), "choose .*cpu"),
    (TRAIN, new("--preset", "DiS-S/4", "--image-size", "30"), "try 28x28 or 32x32"),
    (TRAIN, new("--image-size", "big"), "--image-size|image size"),
    (TRAIN, new("--image-size", "2"), "at least|8"),
    # numbers
    (TRAIN, new("--max-steps", "0"), "at least 1"),
    (TRAIN, new("--max-steps", "many"), "--help"),
    (TRAIN, new("--global-batch-size", "0"), "at least 1"),
    (TRAIN, new("--grad-accum", "3"), "try 6"),
    (TRAIN, new("--lr", "-1"), "at least 0"),
    (TRAIN, new("--lr", "nan"), "at least 0"),
    (TRAIN, new("--cond-dropout", "1.5"), "below 1"),
    (TRAIN, new("--ema-decay", "1"), "below 1"),
    (TRAIN, new("--num-classes", "3"), "drop the flag"),
    (TRAIN, new("--no-such-flag"), "--help"),
    (TRAIN, new("--batch_size=4", "-lr", "1"), "did you mean --global-batch-size, --lr[?] --help"),
    (TRAIN, new("--device", "warp"), "choose .*cpu"),
    # data
    (TRAIN, new("--data", "mnits"), "mnist"),
    (TRAIN, new("--data", "nowhere/at/all"), "shapes"),
    (TRAIN, new("--data", "nothing"), "no images|images"),
    (TRAIN, new("--data", "mnist", "--data-dir", "empty-mnist"), "train-images"),
    (TRAIN, new("--data", "mnist", "--data-dir", "cut-mnist"), "train-images"),
    (TRAIN, new("--data", "mnist", "--data-dir", "swapped-mnist"), "train-images"),
    (TRAIN, new("--data", "mnist", "--data-dir", "short-mnist"), "train-labels|labels"),
    (TRAIN, new("--data", "mnist", "--data-dir", "checksum"), "md5|checksum"),
    (TRAIN, new("--data", "cifar10", "--data-dir", "cut-cifar"), "data_batch_1"),
    (TRAIN, new("--data", "corrupt"), "1.png"),
    (TRAIN, [f for f in new("--data", "mixed") if f not in ("--image-size", "16")], "--image-size"),
    (TRAIN, new("--data", "caption"), "file_name"),
    (TRAIN, new("--data", "gap"), "7.png"),
    # folders and checkpoints
    (TRAIN, new("--results-dir", "file/results"), "file"),
    (TRAIN, new("--results-dir", "results", "--name", "run", "--lr", "0.5"), "--name"),
    (TRAIN, new("--results-dir", "results", "--name", "run", "--max-steps", "1"), "--max-steps"),
    (TRAIN, new("--results-dir", "results", "--name", "run", "--set", "width=64"), "--name"),
    (TRAIN, new("--results-dir", "results", "--name", "run", "--resume", "half.pt"), "--name"),
    (TRAIN, new("--results-dir", "cut", "--name", "run"), "damaged or cut short"),
    (TRAIN, new("--resume", "missing.pt"), "no checkpoint at missing.pt: (?!.*--ckpt)"),
    (TRAIN, new("--resume", "code.pt"), "perhaps code"),
    (TRAIN, new("--resume", "other/unconditional/latest.pt"), "trained differently(?!.*NEW)"),
    (TRAIN, new("--resume", "results/run"), "at step 2 already: pass a larger --max-steps(?!.*NEW)"),
    (TRAIN, new("--results-dir", "results", "--name", "run", "--lr", "1", "--max-steps", "3"), "NEW --resume"),
    (TRAIN, new("--results-dir", "results", "--name", "run", "--set", "width=40", "--max-steps", "3"),
     "NEW(?!.*--resume)"),
    (TRAIN, new("--smoke", "--resume", "results/run"), "drop them"),
    (TRAIN, new("--model", "typo.py"), "'max_step', which is no flag"),
    (TRAIN, [*new("--model", "odd.py"), "--set"], "option gain of odd.py must be a number"),
    (SAMPLE, ["--ckpt", "half.pt", "--num-fid-samples", "2"], "damaged or cut short"),
    (SAMPLE, ["--ckpt", "missing.pt", "--num-fid-samples", "2"], "no checkpoint at missing.pt"),
    (TRAIN, new("--model", "tiny.py", "--preset", "mini"), "unknown preset 'mini': tiny.py has tiny"),
    (TRAIN, [*MDM, "--results-dir", "other", "--name", "words", "--resume", "none", "--init-inner", "gone.pt"],
     "no checkpoint"),                                  # and the run keeps its name
    (SAMPLE, ["results/run"], "did you mean --ckpt results/run[?]"),
    (SAMPLE, ["--results-dir", "nothing"], "train.py"),
    (SAMPLE, ["--ckpt", "missing.pt"], "no checkpoint"),
    (SAMPLE, ["--ckpt", "half.pt"], "damaged or cut short"),
    (SAMPLE, ["--ckpt", "empty.pt"], "damaged or cut short"),
    (SAMPLE, ["--ckpt", "code.pt"], "perhaps code"),
    (SAMPLE, ["--ckpt", "plain.pt"], "perhaps code"),
    (SAMPLE, ["--ckpt", "alien.pt"], "not a checkpoint of this project"),
    (SAMPLE, ["--ckpt", "version.pt"], "version 99"),
    (SAMPLE, ["--ckpt", "misfit.pt"], "do not fit"),
    (SAMPLE, ["--ckpt", "stranger.pt"], "no model 'gone'"),
    # text, sizes inside one another, videos
    (TRAIN, new("--cond", "text"), "pass --model mdm"),
    (TRAIN, new("--text-encoder", "t5"), "add --cond text"),
    (TRAIN, new("--data", "mixed", "--cond", "text"), "no captions: drop --cond"),
    (TRAIN, new("--cond", "class", "--num-classes", "0"), "drop one"),
    (TRAIN, [*MDM, "--cond", "text", "--num-classes", "8"], "drop one"),
    (TRAIN, [*MDM, "--init-inner", "small.pt", "--resume", "small.pt"], "drop one"),
    (TRAIN, [*MDM, "--image-size", "32", "--init-inner", "other/words"], "trained differently: --cond: text"),
    (TRAIN, new("--frames", "4"), "drop --frames"),
    (TRAIN, new("--data", "moving", "--frames", "0"), "at most 1024"),
    (TRAIN, new("--hold-out", "green dragon"), "no caption of shapes contains"),
    (TRAIN, new("--init-inner", "small.pt"), "drop --init-inner, or pass --model mdm"),
    (TRAIN, new("--data", "moving"), "pass --model mdm --preset tiny-video"),
    (TRAIN, [*MDM, "--data", "moving", "--results-dir", "new"], "tiny-video"),
    (TRAIN, [*MDM, "--results-dir", "new", "--init-inner", "gone.pt"], "no checkpoint at gone.pt"),
    (TRAIN, [*MDM, "--results-dir", "new", "--image-size", "32", "--init-inner", "results/run"], "was dis"),
    (TRAIN, [*MDM, "--results-dir", "new", "--image-size", "30x33"], "try 30x32"),
    (TRAIN, [*MDM, "--results-dir", "new", "--set", "mixed=1"], "mixed=1: must be a list"),
    (TRAIN, [*MDM, "--results-dir", "other", "--name", "words"], "--cond: text 0 .was bytes"),
    (SAMPLE, [*CKPT, "--prompt", "a moon"], "drop --prompt"),
    (SAMPLE, [*CKPT, "--levels"], "has one: drop it"),
    (SAMPLE, ["--ckpt", "other/words", "--levels", "--gif"], "drop them"),
    (SAMPLE, ["--ckpt", "other/words", "--num-fid-samples", "2"], "add --prompt @captions.txt"),
    (SAMPLE, ["--ckpt", "other/words", "--text-encoder", "t5"], "drop --text-encoder"),
    (SAMPLE, ["--ckpt", "t5.pt", "--text-encoder", "bytes"], "bytes gives bytes and .* training 24: pass some/t5"),
    (SAMPLE, ["--ckpt", "other/words", "--prompt", "@empty.pt"], "no prompts in @empty.pt"),
    (TRAIN, new("--hold-out", "heart"), "a class has no examples"),
    (TRAIN, [*MDM, "--data", "moving", "--preset", "tiny-video", "--cond", "text", "--hflip"], "drop it"),
    (TRAIN, [*MDM, "--results-dir", "new", "--init-inner", "gone.pt", "--resume", "none"], "no checkpoint"),
    (SAMPLE, [*CKPT, "--clip", "soft"], "imagen"),
    (SAMPLE, ["--ckpt", "other/words", "--class-labels", "1"], "pass --prompt"),
    (SAMPLE, ["--ckpt", "other/words", "--prompt", "@gone.txt"], "gone.txt"),
    (SAMPLE, ["--ckpt", "other/words", *FROM_5, "test"], "--ckpt assets/dis-mnist.pt"),
    (SAMPLE, ["--ckpt", "other/deaf", "--cfg-scale", "2"], "drop --cfg-scale"),
    (SAMPLE, ["--ckpt", "other/deaf", "--negative-prompt", "a moon"], "drop --negative-prompt"),
    (SAMPLE, [*CKPT, "--model", "typo.py"], "is a run of dis: drop --model"),
    (inside.main, ["--ckpt", "own.pt"], "is a run of paper.py: pass a DiS"),
    (SAMPLE, [*CKPT, "--cfg-scale", "1", "--cfg-below", "0.5"], "drop it"),
    (SAMPLE, ["--ckpt", "other/clips", "--gif"], "drop --gif"),
    (SAMPLE, ["--ckpt", "other/clips", "--num-fid-samples", "2"], "drop --gif"),
    # processes, latents
    (TRAIN, new("--shard"), "start more by torchrun"),
    (TRAIN, new("--dry-run", "3"), "over 3 processes.*try 6"),
    (TRAIN, new("--dry-run", "0"), "at least 1"),
    (TRAIN, ["--latents", "nothing"], "no latents.json"),
    (TRAIN, new("--latents", "nothing"), "--image-size is for images"),
    (TRAIN, new("--vae", "nothing"), "add --latents"),
    (SAMPLE, [*CKPT, "--vae", "nothing"], "drop --vae"),
    (DATA, ["images", "shapes", "results"], "not empty"),
    (DATA, ["images", "moving", "new"], "holds clips"),
    (DATA, ["pictures", "shapes", "new"], "invalid choice"),
    (DATA, ["encode", "shapes", "new", "--vae", "nothing"], "pip install diffusers|cannot be loaded"),
    # sampling
    (SAMPLE, [*CKPT, "--class-labels", "8"], "0 to 7"),
    (SAMPLE, [*CKPT, "--class-labels", "-1"], "--help|0 to 7"),
    (SAMPLE, [*CKPT, "--class-labels", "star"], "all, random, or numbers"),
    (SAMPLE, ["--ckpt", "other/unconditional", "--class-labels", "1"], "drop --class-labels"),
    (SAMPLE, [*CKPT, "--steps", "0"], "ask for 1 to 1000"),
    (SAMPLE, [*CKPT, "--steps", "ddim300"], "divides 1000"),
    (SAMPLE, [*CKPT, "--steps", "ddim10,20"], "not understood"),
    (SAMPLE, [*CKPT, "--num-samples", "0"], "at least 1"),
    (SAMPLE, [*CKPT, "--eta", "nan"], "at least 0"),
    (SAMPLE, [*CKPT, "--eta", "0.5", "--sampler", "ddpm"], "drop it"),
    (SAMPLE, ["--ckpt", "other/unconditional", "--cfg-scale", "2"], "drop --cfg-scale"),
    (SAMPLE, [*CKPT, "--out", "picture"], "ends in .png"),
    (SAMPLE, [*CKPT, "--num-fid-samples", "4", "--gif"], "drop"),
    (SAMPLE, [*CKPT, "--num-fid-samples", "4", "--out", "grid.png"], "drop --out"),
    (SAMPLE, [*CKPT, "--cfg-scale", "nan"], "at least -1000"),
    (SAMPLE, [*CKPT, "--cfg-scale=-inf"], "at least -1000"),
    (SAMPLE, [*CKPT, "--sampler", "euler"], "ddim"),
    (SAMPLE, [*CKPT, "--save-images", "fid"], "already holds 000000.png: choose another"),
    (SAMPLE, [*CKPT, "--out", "file/x.png"], "file"),
    (SAMPLE, [*CKPT, "--num-fid-samples", "4", "--save-images", "fid"], "choose another"),
    # denoising
    (SAMPLE, [*CKPT, "--from-step", "50"], "--denoise"),
    (SAMPLE, [*CKPT, "--denoise", "test"], "--from-step 150"),
    (SAMPLE, [*CKPT, "--data-dir", "nothing"], "drop it"),
    (SAMPLE, [*CKPT, "--against", "results/run"], "drop it, or add --denoise test"),
    (SAMPLE, [*CKPT, *FROM_5, "test", "--data-dir", "file", "--gif"], "drop them"),
    (SAMPLE, [*CKPT, *FROM_5, "test", "--num-fid-samples", "4"], "drop them"),
    (SAMPLE, [*CKPT, *FROM_5, "test", "--save-images", "images"], "drop them"),
    (SAMPLE, [*CKPT, *FROM_5, "test", "--class-labels", "random"], "drop them"),
    (SAMPLE, [*CKPT, *FROM_5, "test", "--class-labels", "8"], "0 to 7"),
    (SAMPLE, [*CKPT, *FROM_5, "test", "--num-samples", "5000"], "4096"),
    (SAMPLE, [*CKPT, *FROM_5, "test", "--against", "results/run"], "is --ckpt itself"),
    (SAMPLE, [*CKPT, *FROM_5, "test", "--steps", "7"], "ask for 1 to 6"),
    (SAMPLE, [*CKPT, *FROM_5, "test", "--steps", "ddim3"], "drop 'ddim'"),
    (SAMPLE, [*CKPT, *FROM_5, "test", "--eta", "0.5"], "--sampler ddim"),
    (SAMPLE, [*CKPT, *FROM_5, "test", "--out", "file/x.png"], "file"),
    (SAMPLE, [*CKPT, *FROM_5, "mixed/0.png", "--num-samples", "2"], "--denoise test"),
    (SAMPLE, [*CKPT, *FROM_5, "corrupt/1.png"], "cannot read corrupt/1.png"),
    (SAMPLE, [*CKPT, *FROM_5, "gone.png"], "gone.png"),
    (SAMPLE, [*CKPT, *FROM_5, "mixed"], "one picture"),
    (SAMPLE, [*CKPT, "--denoise", "test", "--from-step", "1000"], "0 to 999"),
    (SAMPLE, [*CKPT, "--denoise", "test", "--from-step", "-1"], "not understood"),
    (SAMPLE, [*CKPT, "--denoise", "test", "--from-step", "5,much"], "write 150"),
    (SAMPLE, ["--ckpt", "folder.pt", *FROM_5, "test"], "pass a picture to --denoise"),
    (SAMPLE, ["--ckpt", "always.pt", *FROM_5, "test"], "pass --class-labels"),
    (SAMPLE, ["--ckpt", "small.pt", *FROM_5, "test"], "--image-size 16"),
]


def is_told(call, argv, fix, capsys):
    before = tree()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call([str(a) for a in argv])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert said.startswith("error: ") and "\n" not in said, said
    assert re.search(fix, said) and "choose dis, sample" not in said, said
    after = tree()
    assert {k: after.get(k) for k in before} == before
    assert "executed" not in after


@pytest.mark.parametrize("call, argv, fix", WRONG,
                         ids=[f"{c.__module__}-{i}" for i, (c, _, _) in enumerate(WRONG)])
def test_wrong_input_gets_one_sentence(world, monkeypatch, capsys, call, argv, fix):
    monkeypatch.chdir(world)
    mirror = (world / "mirror").as_uri() + "/"
    monkeypatch.setattr(datasets, "QUIET", True)
    monkeypatch.setattr(datasets, "MIRRORS", {k: [mirror] for k in datasets.MIRRORS})
    is_told(call, argv, fix, capsys)


@pytest.mark.parametrize("env, fix", [
    (dict(RANK="0", WORLD_SIZE="3", LOCAL_RANK="0"), "cannot be split over 3 processes.*try 6"),
    (dict(RANK="0", WORLD_SIZE="16", LOCAL_RANK="0"), "try 16"),
    (dict(RANK="1"), "needs a WORLD_SIZE above it"), (dict(RANK="", WORLD_SIZE="2"), "RANK expected.* by torchrun")])
def test_bad_world_size_gets_one_sentence(world, monkeypatch, capsys, env, fix):
    monkeypatch.chdir(world)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    is_told(TRAIN, new(), fix, capsys)


def test_a_bug_in_your_own_model_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    """There a UserError is for the user; any other error is a bug, a plain ValueError too."""
    monkeypatch.chdir(tmp_path)
    for error, expected in (("diffusion.UserError", SystemExit), ("ValueError", ValueError)):
        Path(f"{error}.py").write_text(f"""
import diffusion
CONFIGS = {{"tiny": {{}}}}
def build(preset, shape, num_classes=0, **options):
    raise {error}("an odd size: try 32")
""")
        with pytest.raises(expected):
            train.main([*new("--model", f"{error}.py"), "--set"])
    assert capsys.readouterr().err == "error: an odd size: try 32\n"


def test_a_tilde_is_the_home_folder_also_after_an_equals_sign():
    args, home = train.parse(["--results-dir=~/runs", "--resume=~/a.pt", "--name", "a~"]), Path.home()
    assert [args.results_dir, args.resume, args.name] == [str(home / "runs"), str(home / "a.pt"), "a~"]
    assert sample.parse(["--out=~/a.png"]).out == home / "a.png"


def test_the_newest_run_may_lie_in_a_folder_of_runs(tmp_path):
    for name, written in (("old", 1), ("exp/new", 3), ("exp/older", 2)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "latest.pt").touch()
        os.utime(tmp_path / name / "latest.pt", (written, written))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "exp/new/latest.pt"


def test_flags_of_other_programs_are_told_ours(capsys):
    for theirs, ours in cli.OTHERS.items():
        for parse in train.parse, sample.parse:
            with pytest.raises(SystemExit):
                parse([theirs, "3"])
        said = capsys.readouterr().err
        assert all(f"did you mean {flag}?" in said for flag in ours), theirs


def test_commands_to_paste(tmp_path, monkeypatch):
    """With a space in them, and from another folder than the programs'."""
    monkeypatch.chdir(Path(train.__file__).parent)
    assert cli.command("sample.py", "--ckpt", Path("my run")) == "python sample.py --ckpt 'my run'"
    monkeypatch.chdir(tmp_path)
    assert cli.command("sample.py") == cli.quoted(["python", sample.__file__])
    with monkeypatch.context() as windows:
        windows.setattr(cli.os, "name", "nt")
        assert cli.quoted(["a", "my run"]) == 'a "my run"'


def test_two_models_of_your_own_may_be_called_alike(tmp_path, monkeypatch):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.py").write_text(f"CONFIGS = {{'tiny': '{folder}'}}\nbuild = None\n")
    monkeypatch.chdir(tmp_path / "a")
    models = [checkpoint.load_paper(name) for name in ("net.py", "../b/net.py", str(tmp_path / "a/net.py"))]
    assert [model.CONFIGS["tiny"] for model in models] == ["a", "b", "a"] and models[0] is models[2]
    assert checkpoint.load_paper(str(Path(train.__file__).parent / "dis.py")) is checkpoint.load_paper("dis")


@pytest.mark.parametrize("suffix, width", [("webp", 16384), ("jpg", 65501), ("gif", 65536)])
def test_a_picture_too_large_for_its_format_becomes_a_png(tmp_path, capsys, suffix, width):
    """No picture is lost, and no file that the user did not name."""
    frames = [Image.new("RGB", (width, 1), colour) for colour in ("red", "blue")]
    path = pictures.save_image(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert path == tmp_path / f"a.{suffix}.png" and os.listdir(tmp_path) == [path.name]
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size == (width, 1) and image.n_frames == 2
    assert f"{width} x 1 pixels are too many for a .{suffix}" in capsys.readouterr().out
    assert pictures.save_image(Image.new("RGB", (width - 1, 1)), tmp_path / f"a.{suffix}").suffix == f".{suffix}"


@pytest.mark.parametrize("error, told", [(UserError("x"), True), (FileNotFoundError("x"), True),
                                         (ValueError("x"), False), (ConnectionResetError("x"), False),
                                         (RuntimeError("y: No working C++ compiler found in x"), True),
                                         (RuntimeError("Expected to have finished reduction in the prior step"), True)])
def test_which_errors_are_told_in_a_sentence(error, told):
    @cli.told_plainly()
    def main():
        raise error
    with pytest.raises(SystemExit if told else type(error)):
        main()
