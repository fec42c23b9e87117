"""How good are the pictures? A small classifier, trained on real pictures, looks at samples.

    python benchmarks/judge.py --data mnist                       the judge itself, on cases with known answers
    python benchmarks/judge.py samples.npz --data mnist           uint8 images (N, H, W, C) in arr_0; if there is an
                                                                  arr_1, it holds the classes asked for
    python benchmarks/judge.py FOLDER --data mnist --class-labels all
                                                                  PNGs; --class-labels as you gave it to sample.py

It prints
    recognised   the share of samples that the classifier takes for the class asked for
    distance     the Frechet distance between samples and test set: the classifier's features of each are taken as a
                 normal distribution, and the two distributions are compared
    x real       that distance, divided by the distance of as many real images. These are training images that the
                 classifier has not seen, equally many of each class
    precision    the share of samples that lie among real images
    recall       the share of real images that lie among samples. (Kynkaanniemi et al. 2019: "among" means closer to
                 some image than its 3rd neighbour is)

With fewer images the distance is larger, whatever they show. So compare `distance` and `x real` only between sets of
equally many images. They are not FID either: the features are this classifier's, and they are for one data set only.

The classifiers of MNIST, shapes and CIFAR-10 are in assets/, in half precision. Training one again on another machine
changes distances by about 10%, by rounding alone (measured for MNIST). The classifiers of other data sets are trained
once and kept in --cache; with --train, so is a new one of these. That of CIFAR-10 recognises 89.0% of the test images;
its precision is no measure: it calls pure noise precise (0.88). Without samples, this program shows such cases.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support  # noqa: F401 (before torch)
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn

from diffusion import UserError, fold, uniform
from support import checkpoint, cli, datasets
from support.pictures import to_pil

NEIGHBOUR = 3                           # "among these images": within the distance of an image's 3rd neighbour
ASSETS = Path(__file__).resolve().parent.parent / "assets"


def conv(C, width):
    return nn.Sequential(nn.Conv2d(C, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Classifier(nn.Module):
    """(B, C, H, W) in [-1, 1] -> features (B, 128 or 256), logits (B, K). Photographs get a deeper network, a narrow
    ResNet-9."""

    def __init__(self, shape, num_classes, photographs=False):
        super().__init__()
        C, H, W = shape
        if photographs:
            self.body = nn.Sequential(
                conv(C, 32), conv(32, 64), nn.MaxPool2d(2), Residual(conv(64, 64), conv(64, 64)),
                conv(64, 128), nn.MaxPool2d(2), conv(128, 256), nn.MaxPool2d(2),
                Residual(conv(256, 256), conv(256, 256)), nn.AdaptiveMaxPool2d(1), nn.Flatten())
            self.head = nn.Linear(256, num_classes)
            return
        layers = []
        for width in (32, 64):
            for _ in range(2):
                layers += [nn.Conv2d(C, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                C = width
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(C * (H // 4) * (W // 4), 128), nn.ReLU())
        self.head = nn.Linear(128, num_classes)

    def forward(self, x):
        f = self.body(x)
        return f, self.head(f)


def moved(x, seeds):
    """Mirror every second image, and move each by up to 4 pixels; the empty border is grey. x (B, C, H, W)."""
    flip = uniform(fold(seeds, 0)) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    rows, cols = ((uniform(fold(seeds, k)) * 9).long() for k in (1, 2))
    return torch.stack([image[:, i:i + x.shape[2], j:j + x.shape[3]]
                        for image, i, j in zip(F.pad(x, (4, 4, 4, 4)), rows.tolist(), cols.tolist())])   # (B, C, H, W)


def train(dataset, photographs=False, steps=None, batch=128, seed=0):
    """-> a trained Classifier. Its 1,400 steps go 3.6 times through 50,000 images: 3 minutes on two cores. 2,600 steps
    of photographs took 34 minutes on a busy core that has bf16."""
    torch.manual_seed(seed)
    net = Classifier(dataset.shape, dataset.num_classes, photographs)
    if photographs:                         # with bf16, below, almost three times as fast
        net = net.to(memory_format=torch.channels_last)
    steps = steps or (2600 if photographs else 1400)
    bf16 = (photographs and torch.backends.mkldnn.is_available()            # not in every build of PyTorch
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=5e-2 if photographs else 1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step, indices in enumerate(datasets.batch_order(len(dataset), seed, batch, 0, steps, 0, batch)):
        part = dataset[indices]
        x = part["x"] / 127.5 - 1
        if photographs:
            x = moved(x, fold(seed, step, torch.arange(batch))).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(net(x)[1], part["y"], label_smoothing=0.1 if photographs else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return net.eval()


def frechet(f, g):
    """The Frechet distance |mean f - mean g|^2 + tr(F + G - 2 (F G)^1/2) of features f (N, d) and g (M, d); F and G
    are their covariances."""
    f, g = f.double(), g.double()
    F_, G = torch.cov(f.T), torch.cov(g.T)                                                  # (d, d)
    values, vectors = torch.linalg.eigh(F_)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # F G and F^1/2 G F^1/2 have the same eigenvalues, and the second is symmetric
    trace = torch.linalg.eigvalsh(root @ G @ root).clamp(min=0).sqrt().sum()
    return ((f.mean(0) - g.mean(0)).square().sum() + F_.trace() + G.trace() - 2 * trace).item()


def share_within(points, of):
    """The share of points (N, d) that lie within the radius of some image in `of` (M, d). The radius of an image is
    the distance to its NEIGHBOUR-th neighbour."""
    radius = torch.cat([torch.cdist(part, of).kthvalue(NEIGHBOUR + 1, dim=1).values         # + 1: itself is the 1st
                        for part in of.split(1000)])                                        # (M,)
    inside = [(torch.cdist(part, of) <= radius).any(1) for part in points.split(1000)]
    return torch.cat(inside).float().mean().item()


def path_of(name, image_size, cache, anew=False):
    """Where the classifier of a data set is or will be: in the cache, or in assets if it is only there."""
    kept = Path(cache) / f"{name}{f'-{image_size}' if image_size else ''}-judge.pt"
    there = ASSETS / kept.name
    return there if there.exists() and not kept.exists() and not anew else kept


class Judge:
    """The judge of one data set: `judge(images, labels)` -> a dict of the numbers above.

    accuracy       the share of the test set that the classifier recognises
    half_distance  the distance between two halves of the test set
    fresh          the sixth of the training images that the classifier has not seen
    """

    def __init__(self, name, data_dir=None, image_size=None, cache="results", say=print, anew=False):
        train_set = datasets.load(name, data_dir, image_size)
        order = np.random.default_rng(1).permutation(len(train_set))
        self.fresh = train_set.subset(order[:len(order) // 6])
        test, photographs = datasets.load(name, data_dir, image_size, "test"), name == "cifar10"
        if not test.num_classes or len(test.shape) != 3:
            raise UserError(f"the judge needs pictures with classes, and {name} has none: use shapes, mnist, fashion "
                            f"or cifar10")
        self.path = path = path_of(name, image_size, cache, anew)
        if anew or not path.exists():
            say(f"training a classifier of {name}: this happens once and takes minutes ...")
            net = train(train_set.subset(order[len(order) // 6:]), photographs)
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.replace(path, lambda f: torch.save(net.half().state_dict(), f))
        self.net = Classifier(test.shape, test.num_classes, photographs)
        self.net.load_state_dict(torch.load(path, weights_only=True))           # into float32
        self.net.eval()
        self.shape, self.num_classes = test.shape, test.num_classes
        everything = test[range(len(test))]
        self.real, guesses = self.look(everything["x"])
        self.accuracy = (guesses == everything["y"]).float().mean().item()
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(self.real)))
        half = len(order) // 2
        self.half_distance = frechet(self.real[order[:half]], self.real[order[half:]])
        self.real = self.real[order]            # shuffled: the first n are a fair choice
        self.floors = {}

    @torch.no_grad()
    def look(self, images):
        """uint8 (N, C, H, W) -> features (N, 128 or 256), guessed classes (N,)."""
        features, logits = zip(*(self.net(part / 127.5 - 1) for part in torch.as_tensor(images).split(500)))
        return torch.cat(features), torch.cat(logits).argmax(1)

    def some_fresh(self, n, seed):
        """The indices of n fresh images, equally many of each class."""
        order = np.random.default_rng(seed).permutation(len(self.fresh))
        labels = self.fresh.labels.numpy()[order]
        rank = np.empty(len(order), int)                        # an image is its class's first, second, ..
        for y in range(self.num_classes):
            rank[labels == y] = np.arange((labels == y).sum())
        return order[np.argsort(rank, kind="stable")[:n]]

    def floor(self, n, draws=5):
        """How far n fresh images are from the test set: the mean of some draws."""
        if n not in self.floors:
            self.floors[n] = float(np.mean([frechet(self.look(self.fresh[self.some_fresh(n, d)]["x"])[0],
                                                    self.real) for d in range(draws)]))
        return self.floors[n]

    def __call__(self, images, labels=None):
        """uint8 (N, C, H, W) and the classes asked for (N,) -> {"n", "recognised", "distance", "x_real", "precision",
        "recall"}."""
        n = len(images)
        features, guesses = self.look(images)
        distance = frechet(features, self.real)
        real = self.real[:n]                    # equally many: then neighbours are equally near in both
        return {"n": n,
                "recognised": None if labels is None else (guesses == labels).float().mean().item(),
                "distance": distance, "x_real": distance / self.floor(n),
                "precision": share_within(features, real), "recall": share_within(real, features)}


def report(rows):
    """rows: (name, what the judge said) -> text."""
    lines = [f"{'':28s} {'n':>6s} {'recognised':>11s} {'distance':>9s} {'x real':>7s} {'precision':>10s} "
             f"{'recall':>7s}"]
    for name, r in rows:
        seen = "-" if r["recognised"] is None else f"{r['recognised']:.1%}"
        lines.append(f"{name:28s} {r['n']:6,d} {seen:>11s} {r['distance']:9.4g} {r['x_real']:7.3g} "
                     f"{r['precision']:10.3f} {r['recall']:7.3f}")
    return "\n".join(lines)


def known_cases(judge, n):
    """Real images, and pictures with each fault that we can think of -> (name, images, labels), one after another."""
    rng, n = np.random.default_rng(9), min(n, len(judge.fresh) // 2)
    every = judge.some_fresh(len(judge.fresh), seed=9)
    batch = judge.fresh[every[:n]]
    x, y = batch["x"], batch["y"]
    yield "real images", x, y
    yield "labels shuffled", x, y[torch.from_numpy(rng.permutation(n))]
    yield "blurred, sigma 1 px", blurred(x, 1), y
    noise = torch.from_numpy(rng.normal(0, 25, x.shape))
    yield "with noise, sigma 0.1", (x + noise).round().clamp(0, 255).to(torch.uint8), y
    left = every[(judge.fresh.labels[every] != 0).numpy()][:n]
    batch = judge.fresh[left]
    yield "no picture of class 0", batch["x"], batch["y"]
    few = torch.from_numpy(rng.integers(0, 50, n))
    yield "50 images, over and over", x[few], y[few]
    yield "nothing but noise", torch.from_numpy(rng.integers(0, 256, x.shape, dtype=np.uint8)), y


def blurred(x, sigma):
    """uint8 (N, C, H, W) -> the same, blurred by a Gaussian of sigma pixels."""
    images = [to_pil(image) for image in x.permute(0, 2, 3, 1).numpy()]                # (H, W, C)
    soft = [np.atleast_3d(np.asarray(i.filter(ImageFilter.GaussianBlur(sigma)))) for i in images]
    return torch.from_numpy(np.stack(soft)).permute(0, 3, 1, 2)                               # (N, C, H, W)


def read_samples(path, class_labels, num_classes, seed):
    """An .npz or a folder of PNGs -> uint8 (N, C, H, W), and labels (N,) or None. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.png"))
        if not files:
            raise UserError(f"no .png in {path}: pass what `sample.py --save-images` wrote")
        images, labels = np.stack([np.atleast_3d(np.asarray(Image.open(f))) for f in files]), None
    elif path.suffix == ".npz" and path.exists():
        with np.load(path) as file:
            images, labels = file["arr_0"], file["arr_1"] if "arr_1" in file else None
    else:
        raise UserError(f"{path} is neither a folder nor an .npz: pass samples, or nothing")
    if labels is not None:
        labels = torch.from_numpy(labels).long()
    elif class_labels:
        labels = cli.choose_labels(class_labels, num_classes, seed + torch.arange(len(images)))
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels                               # (N, C, H, W)


@cli.told_plainly()
def main(argv=None):
    p = cli.Parser(__doc__)
    p.add_argument("samples", nargs="*", help="folders of PNGs, or .npz files (none: cases with known answers)")
    p.add_argument("--data", default="mnist", help="what the samples should look like")
    p.add_argument("--data-dir", help="as in train.py")
    p.add_argument("--image-size", help="as in train.py")
    p.add_argument("--class-labels", help="as you gave it to sample.py: all, random, or 0,1,2")
    p.add_argument("--seed", type=cli.number(int), default=0, help="as you gave it to sample.py")
    p.add_argument("--num-samples", type=cli.number(int, 50), default=1000, help="images in each known case")
    p.add_argument("--cache", default="results", help="where classifiers are kept")
    p.add_argument("--train", action="store_true", help="train a new classifier, into --cache")
    args = p.parse_args(argv)
    judge = Judge(args.data, args.data_dir, args.image_size, args.cache, anew=args.train)
    cases = []
    for path in args.samples:
        images, labels = read_samples(path, args.class_labels, judge.num_classes, args.seed)
        if tuple(images.shape[1:]) != judge.shape or len(images) <= NEIGHBOUR:
            raise UserError(f"{path} has {len(images)} images of {tuple(images.shape[1:])}, and {args.data} is "
                            f"{judge.shape}: pass --data and --image-size as in training")
        cases.append((str(path), images, labels))
    print(f"the classifier recognises {judge.accuracy:.2%} of {len(judge.real):,} test images; the distance between "
          f"two halves of them is {judge.half_distance:.3g}")
    print(report((name, judge(images, labels))
                 for name, images, labels in cases or known_cases(judge, args.num_samples)))


if __name__ == "__main__":
    cli.run(main)
