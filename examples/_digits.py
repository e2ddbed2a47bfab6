"""Data and networks that the examples share: scikit-learn's digits, 1797 images of 8 x 8."""

import argparse

import torch
from sklearn.datasets import load_digits


def digits():
    """((inputs, targets) to train on, the same to test on)."""
    data = load_digits()
    inputs, targets = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    inputs, targets = inputs[order], targets[order]
    return (inputs[:1400], targets[:1400]), (inputs[1400:], targets[1400:])


def network(width=64, seed=0):
    """A two-layer perceptron."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))


def batches(data, size, steps, seed=0):
    """So many random batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(data[0]), (size,), generator=generator)
        yield data[0][chosen], data[1][chosen]


def quick():
    """Whether --quick was given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="shorter, to see that it runs")
    return parser.parse_args().quick
