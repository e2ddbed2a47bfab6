"""Two checkpoints: what differs by more than its error, and the loss on the path between them."""

import copy

import torch
import torch.nn.functional as F
from _digits import batches, digits, network, quick

import sharpkit as sk

steps = 60 if quick() else 600
train, _ = digits()
model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
objective = sk.Objective(model, train, loss=F.cross_entropy)
checkpoints, measured = [], {}
for step, (x, y) in enumerate(batches(train, 64, steps)):
    if step % (steps // 6) == 0:
        checkpoints.append(copy.deepcopy(model.state_dict()))
    if step == steps // 6:
        measured["early"] = sk.measure(objective, optimizer=optimizer)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
measured["late"] = sk.measure(objective, optimizer=optimizer)
comparison = sk.compare(measured)
print(comparison)
path = sk.landscape(objective, checkpoints, optimizer=optimizer, points=7 if steps == 60 else 21)
print(*path.findings(), sep="\n")
print("page:", sk.report("checkpoints.html", [comparison, path]))
