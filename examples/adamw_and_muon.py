"""The sharpness that SGD, AdamW and Muon feel at one point, each against its own limit."""

import torch
import torch.nn.functional as F
from _digits import batches, digits, network, quick

import sharpkit as sk

steps = 30 if quick() else 300
train, _ = digits()
model = network()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for x, y in batches(train, 64, steps):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
objective = sk.Objective(model, train, loss=F.cross_entropy)
others = [torch.optim.SGD(model.parameters(), lr=0.1)]
if hasattr(torch.optim, "Muon"):  # torch 2.9 and newer; for matrices alone
    matrices = [p for p in model.parameters() if p.ndim == 2]
    print(sk.generalized_sharpness(objective.with_params("*.weight"), torch.optim.Muon(matrices, lr=0.02)))
print(sk.compare_optimizers(objective, [optimizer, *others]))
