"""Does a rate transfer from narrow to wide? Once as PyTorch initialises, once parametrised."""

import torch
import torch.nn.functional as F
from _digits import digits, quick

import sharpkit as sk

train, _ = digits()
data = [(train[0][i : i + 64], train[1][i : i + 64]) for i in range(0, 640, 64)]
widths = [32, 64, 128] if quick() else [64, 128, 256, 512]


def build(width):
    """A fresh network; the check seeds PyTorch before it calls this."""
    layers = torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 10)
    return torch.nn.Sequential(*layers)


def adam(model, width):
    """The optimizer in question, with the rate that it has at this width."""
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def parametrised(model, width):
    """The same, with the maximal update parametrisation put in."""
    optimizer = adam(model, width)
    sk.transfer.parametrize(model, build(32), optimizer)
    return optimizer


for name, make in (("as PyTorch has it", adam), ("parametrised", parametrised)):
    check = sk.transfer.coordinate_check(build, widths=widths, optimizer=make, data=data, loss=F.cross_entropy)
    print(f"{name}: {'passes' if check.passed else 'fails'}")
    print(*check.findings(), sep="\n")
