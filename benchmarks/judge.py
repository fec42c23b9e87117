"""How good are the pictures? A small classifier, trained on real pictures, looks at samples.

    python benchmarks/judge.py --data mnist                       the judge itself, on cases with known answers
    python benchmarks/judge.py FOLDER --data mnist                PNGs of `sample.py --save-images`

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

The classifiers of MNIST, shapes and CIFAR-10 are in assets/, in half precision; one that is not there is trained.
Training one again on another machine changes distances by about 10%, by rounding alone (measured for MNIST). That of
CIFAR-10 recognises 89.0% of the test images; its precision is no measure: it calls pure noise precise (0.88).
"""
from pathlib import Path

from timing import ROOT         # first: it finds support/, which comes before torch
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn

from diffusion import UserError, fold, uniform
from support import checkpoint, cli, datasets
from support.pictures import to_pil

NEIGHBOUR = 3                           # "among these images": within the distance of an image's 3rd neighbour
ASSETS = ROOT / "assets"


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


class Judge:
    """The judge of one data set: `judge(images, labels)` -> a dict of the numbers above.

    accuracy   the share of the test set that the classifier recognises
    fresh      the sixth of the training images that the classifier has not seen
    """

    def __init__(self, name, data_dir=None):
        train_set, test = datasets.load(name, data_dir), datasets.load(name, data_dir, split="test")
        order, photographs = np.random.default_rng(1).permutation(len(train_set)), name == "cifar10"
        self.fresh = train_set.subset(order[:len(order) // 6])
        if not test.num_classes or len(test.shape) != 3:
            raise UserError(f"the judge needs pictures with classes, and {name} has none: use shapes, mnist, fashion "
                            f"or cifar10")
        self.path = ASSETS / f"{name}-judge.pt"
        if not self.path.exists():
            print(f"training a classifier of {name}: this happens once and takes minutes ...")
            net = train(train_set.subset(order[len(order) // 6:]), photographs)
            checkpoint.replace(self.path, lambda f: torch.save(net.half().state_dict(), f))
        self.net = Classifier(test.shape, test.num_classes, photographs)
        self.net.load_state_dict(torch.load(self.path, weights_only=True))      # into float32
        self.net.eval()
        self.shape, self.num_classes, self.floors = test.shape, test.num_classes, {}
        everything = test[range(len(test))]
        real, guesses = self.look(everything["x"])
        self.accuracy = (guesses == everything["y"]).float().mean().item()
        self.real = real[np.random.default_rng(0).permutation(len(real))]       # so the first n are a fair choice

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

    def draws(self, n, count):
        """How far n fresh images are from the test set: the distances of so many draws of them."""
        return [frechet(self.look(self.fresh[self.some_fresh(n, seed)]["x"])[0], self.real) for seed in range(count)]

    def floor(self, n):
        """The mean of five such draws."""
        if n not in self.floors:
            self.floors[n] = float(np.mean(self.draws(n, 5)))
        return self.floors[n]

    def __call__(self, images, labels):
        """uint8 (N, C, H, W) and the classes asked for (N,) -> {"n", "recognised", "distance", "x_real", "precision",
        "recall"}."""
        n = len(images)
        features, guesses = self.look(images)
        distance = frechet(features, self.real)
        real = self.real[:n]                    # equally many: then neighbours are equally near in both
        return {"n": n, "recognised": (guesses == labels).float().mean().item(),
                "distance": distance, "x_real": distance / self.floor(n),
                "precision": share_within(features, real), "recall": share_within(real, features)}


def known_cases(judge, n=1000):
    """Real images, and pictures with each fault that we can think of -> (name, images, labels), one after another."""
    rng, n = np.random.default_rng(9), min(n, len(judge.fresh) // 2)
    every = judge.some_fresh(len(judge.fresh), seed=9)
    x, y = (judge.fresh[every[:n]][k] for k in "xy")
    yield "real images", x, y
    yield "labels shuffled", x, y[torch.from_numpy(rng.permutation(n))]
    soft = [to_pil(image).filter(ImageFilter.GaussianBlur(1)) for image in x.permute(0, 2, 3, 1).numpy()]  # (H, W, C)
    yield "blurred, sigma 1 px", stacked(soft), y
    noise = torch.from_numpy(rng.normal(0, 25, x.shape))
    yield "with noise, sigma 0.1", (x + noise).round().clamp(0, 255).to(torch.uint8), y
    left = judge.fresh[every[(judge.fresh.labels[every] != 0).numpy()][:n]]
    yield "no picture of class 0", left["x"], left["y"]
    few = torch.from_numpy(rng.integers(0, 50, n))
    yield "50 images, over and over", x[few], y[few]
    yield "nothing but noise", torch.from_numpy(rng.integers(0, 256, x.shape, dtype=np.uint8)), y


def stacked(images):
    """PIL images -> uint8 (N, C, H, W)."""
    return torch.from_numpy(np.stack([np.atleast_3d(np.asarray(i)) for i in images])).permute(0, 3, 1, 2)


@cli.told_plainly()
def main(argv=None):
    p = cli.Parser(__doc__)
    p.add_argument("samples", nargs="*", help="folders of PNGs (none: cases with known answers)")
    p.add_argument("--data", default="mnist", help="what the samples should look like")
    p.add_argument("--data-dir", help="as in train.py")
    p.add_argument("--class-labels", default="all", help="as in sample.py: all, 0,1,2, or random with seed 0")
    args = p.parse_args(argv)
    judge, cases = Judge(args.data, args.data_dir), []
    for folder in args.samples:
        files = sorted(Path(folder).glob("*.png"))
        if not files:
            raise UserError(f"no .png in {folder}: pass what `sample.py --save-images` wrote")
        try:
            images = stacked(map(Image.open, files))
        except ValueError:
            raise UserError(f"{folder} has images of several shapes: pass what one `sample.py --save-images` "
                            f"wrote") from None
        if tuple(images.shape[1:]) != judge.shape or not NEIGHBOUR < len(images) <= len(judge.fresh):
            raise UserError(f"{folder} has {len(images)} images of {tuple(images.shape[1:])}: the judge of {args.data} "
                            f"needs {NEIGHBOUR + 1} to {len(judge.fresh)} of {judge.shape}")
        labels = cli.choose_labels(args.class_labels, judge.num_classes, torch.arange(len(images)))
        cases.append((folder, images, labels))
    print(f"the classifier recognises {judge.accuracy:.2%} of {len(judge.real):,} test images")
    print(f"{'':28s} {'n':>6s} {'recognised':>11s} {'distance':>9s} {'x real':>7s} {'precision':>10s} {'recall':>7s}")
    for name, images, labels in cases or known_cases(judge):
        r = judge(images, labels)
        print(f"{name:28s} {r['n']:6,d} {r['recognised']:11.1%} {r['distance']:9.4g} {r['x_real']:7.3g} "
              f"{r['precision']:10.3f} {r['recall']:7.3f}")
    if not cases:
        draws = [distance / judge.floor(r["n"]) for distance in judge.draws(r["n"], 20)]
        print(f"20 draws of {r['n']:,} real images: x real {min(draws):.2f} to {max(draws):.2f}")


if __name__ == "__main__":
    cli.run(main)
