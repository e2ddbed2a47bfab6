"""Which rate to train with, and where training breaks at each batch size."""

import torch
import torch.nn.functional as F
from _digits import digits, network, quick

import sharpkit as sk

short = quick()
train, _ = digits()
model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
objective = sk.Objective(model, train, loss=F.cross_entropy)
rate = sk.suggest_learning_rate(objective, optimizer, batch_size=32, steps=300 if short else 2000, schedule="cosine")
print(*rate.findings(), sep="\n")
curve = sk.learning_rate_curve(objective, optimizer, batch_sizes=[16, 64, 256], pilot=20 if short else 100, calibrate=not short)
print(curve.table())
print("page:", sk.report("rates.html", [rate, curve]))
