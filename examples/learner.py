"""A run that sets its own rate, ends at its best held-out point, and says why it did what."""

import torch
import torch.nn.functional as F
from _digits import batches, digits, network, quick

import sharpkit as sk

steps = 60 if quick() else 1000
train, test = digits()
model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)  # the rate given does not matter
held_out, rest = (train[0][:200], train[1][:200]), (train[0][200:], train[1][200:])
learner = sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=steps, validation=held_out)
for batch in batches(rest, 32, steps):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    learner.step(batch, loss=loss)
print(learner.history)
print(f"test loss {F.cross_entropy(model(test[0]), test[1]).item():.3f}")
