"""What the loss looks like around here: along the sharpest directions and along the gradient, beside the stability limit."""

import torch
import torch.nn.functional as F
from _digits import batches, digits, network, quick

import sharpkit as sk

short = quick()
train, _ = digits()
model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for x, y in batches(train, 64, 30 if short else 300):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
objective = sk.Objective(model, train, loss=F.cross_entropy)
plane = sk.landscape(objective, optimizer=optimizer, points=7 if short else 25)
line = sk.landscape(objective, "gradient", dimensions=1, optimizer=optimizer)
print(*plane.findings(), *line.findings(), sep="\n")
print("page:", sk.report("landscape.html", [plane, line]))
