"""Trains the models of examples/certified_images.py with orthogonal layers of PyTorch packages.

    make .venv-peers/installed
    .venv-peers/bin/python tools/peers.py --layers=torchlip --model=perceptron --goal=small

The models without attention (`no_attention` and `perceptron`), the loss, the shifts of the images,
the optimizer and its schedule are those of the example; the layers are `SpectralLinear` of
deel-torchlip or `OrthoLinear` of orthogonium, with their default settings. These layers are
1-Lipschitz up to the stopping rules of their iterations, so the radii are divided by the product of
the norms of the kernels, computed in float64. A run adds a line to --record, which the option
`--table` of the example reads. The images are those of `mnist.npz` in the folder `LIPATTN_DATA`.
"""

import argparse
import importlib
import itertools
import json
import math
import os
import pathlib
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

CLASSES, BATCH, LEARNING_RATE = 10, 256, 0.03
PATCH, WIDTH, HEAD = 7, 96, 512
RADII = (0.3, 0.5, 1.0, 1.58)
# Radius and temperature of the loss, largest shift in pixels: as in examples/certified_images.py.
GOALS = {"small": (0.5, 20.0, 1.0), "large": (2.2, 6.0, 0.0)}


def linear_layer(name: str):
    """The class of orthogonal layers of a package."""
    module, layer = {
        "torchlip": ("deel.torchlip", "SpectralLinear"),
        "orthogonium": ("orthogonium.layers.linear.ortho_linear", "OrthoLinear"),
    }[name]
    return getattr(importlib.import_module(module), layer)


class MaxMin(nn.Module):
    """Sorts pairs of entries, as `keras_lipattn.MaxMin`."""

    def forward(self, x):
        return x.unflatten(-1, (-1, 2)).sort(dim=-1).values.flatten(-2)


class Residual(nn.Module):
    """`(1 - alpha) x + alpha branch(x)` with a learned `alpha` in [0, 1], 0.25 at the start."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch
        self.logit = nn.Parameter(torch.tensor(math.log(0.25 / 0.75)))

    def forward(self, x):
        alpha = torch.sigmoid(self.logit)
        return (1.0 - alpha) * x + alpha * self.branch(x)


class Patches(nn.Module):
    """Squares of images `(batch, 28, 28)` as tokens, plus learned positions after a layer."""

    def __init__(self, embed):
        super().__init__()
        self.embed = embed
        self.positions = nn.Parameter(0.5 * torch.randn((28 // PATCH) ** 2, WIDTH))

    def forward(self, images):
        grid = images.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).transpose(2, 3)
        return self.embed(grid.flatten(3).flatten(1, 2)) + self.positions


def build(model: str, dense) -> nn.Module:
    """A classifier of images `(batch, 28, 28)`."""
    if model == "perceptron":
        units = [784, HEAD, HEAD, HEAD, HEAD]
        parts = [nn.Flatten()]
    else:
        tokens = (28 // PATCH) ** 2
        branches = (
            nn.Sequential(dense(WIDTH, 2 * WIDTH), MaxMin(), dense(2 * WIDTH, WIDTH))
            for _ in range(2)
        )
        parts = [Patches(dense(PATCH**2, WIDTH)), *map(Residual, branches), nn.Flatten()]
        units = [tokens * WIDTH, HEAD, HEAD]
    for inputs, outputs in itertools.pairwise(units):
        parts += [dense(inputs, outputs), MaxMin()]
    return nn.Sequential(*parts, dense(HEAD, CLASSES))


def shifted(images, largest):
    """Images moved by uniform amounts of at most `largest` pixels along each axis."""
    move = (2.0 * torch.rand(len(images), 2, 1) - 1.0) * 2.0 * largest / images.shape[-1]
    matrix = torch.cat([torch.eye(2).expand(len(images), 2, 2), move], dim=2)
    grid = functional.affine_grid(matrix, (len(images), 1, *images.shape[1:]), False)
    return functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def train(model, images, classes, goal, epochs):
    radius, temperature, shift = GOALS[goal]
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-7)
    steps = epochs * -(-len(images) // BATCH)
    warm, step = steps // 20, 0
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            if step < warm:
                rate = LEARNING_RATE * step / warm
            else:
                fall = 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warm) / (steps - warm))))
                rate = LEARNING_RATE * (0.01 + 0.99 * fall)
            optimizer.param_groups[0]["lr"] = rate
            logits = model(shifted(images[batch], shift))
            margin = math.sqrt(2.0) * radius * functional.one_hot(classes[batch], CLASSES)
            loss = functional.cross_entropy(temperature * (logits - margin), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}", flush=True)


def constant(model) -> float:
    """A bound of the model's constant: no activation and no sum of a residual adds to it."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    kernels = [layer.weight.detach().double().numpy() for layer in layers]
    if not all(np.isfinite(kernel).all() for kernel in kernels):
        return math.inf
    return math.prod(max(1.0, float(np.linalg.norm(kernel, 2))) for kernel in kernels)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", choices=["torchlip", "orthogonium"], required=True)
    parser.add_argument("--model", choices=["perceptron", "no_attention"], default="perceptron")
    parser.add_argument("--goal", choices=sorted(GOALS), default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", type=pathlib.Path, default="build/results/images.jsonl")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(flags.seed)
    started, processor = time.monotonic(), time.process_time()
    data = np.load(pathlib.Path(os.environ["LIPATTN_DATA"]) / "mnist.npz")
    train_x, test_x = (
        torch.tensor(data[f"x_{part}"] / 255.0).float() for part in ("train", "test")
    )
    model = build(flags.model, linear_layer(flags.layers))
    train(model, train_x, torch.tensor(data["y_train"]).long(), flags.goal, flags.epochs)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in test_x.split(500)])
        total = constant(model)
    leading = torch.topk(logits, 2).values
    correct = logits.argmax(dim=1).numpy() == data["y_test"]
    radius = (leading[:, 0] - leading[:, 1]).numpy() / (math.sqrt(2.0) * total)
    results = {
        "dataset": "mnist",
        "goal": flags.goal,
        "model": f"{flags.model} ({flags.layers})",
        "seed": flags.seed,
        "epochs": flags.epochs,
        "weights": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "constant": total,
        "clean": float(correct.mean()),
        "certified": {f"{each:g}": float((correct & (radius > each)).mean()) for each in RADII},
        "seconds": round(time.monotonic() - started),
        "processor seconds": round(time.process_time() - processor),
        "threads": flags.threads,
    }
    flags.record.parent.mkdir(parents=True, exist_ok=True)
    with open(flags.record, "a") as file:
        file.write(json.dumps(results) + "\n")
    print(results)


if __name__ == "__main__":
    main()
