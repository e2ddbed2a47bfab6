"""Sharpness while training, beside the stability limit, and a page of it."""

import torch
import torch.nn.functional as F
from _digits import batches, digits, network, quick

import sharpkit as sk

steps = 60 if quick() else 1000
train, _ = digits()
model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
with sk.Monitor(model, optimizer, loss=F.cross_entropy, every=20, sinks="run.jsonl") as monitor:
    for batch in batches(train, 64, steps):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        monitor.step(batch, loss=loss)
        optimizer.step()
        optimizer.zero_grad()
print(*monitor.history.findings(), sep="\n")
print("page:", sk.report("monitor.html", [monitor.history]))
