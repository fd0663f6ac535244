"""Learned learning rates: one for each of twenty steps, against the best that is the same for all of them.

Maclaurin et al., "Gradient-based hyperparameter optimization through reversible learning" (ICML 2015). The
meta tensor is the logarithm of the rates; the optimiser asks for them by the step. What is printed is the
loss on images that were never seen, of students from initial weights that were never seen.
Run: python docs/examples/learning_rates.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import l2t

x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
torch.manual_seed(0)
x, y = x.float()[order := torch.randperm(len(x))] / 16, y[order]
dev, test = slice(1000, 1400), slice(1400, None)


def train(seed, log_lr, judges=dev):
    torch.manual_seed(seed)
    return l2t.unroll(
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        torch.randint(1000, (20, 32)),
        lambda model, i, step: cross_entropy(model(x[i]), y[i]),
        lambda model: cross_entropy(model(x[judges]), y[judges]),
        optimizer=l2t.optim.SGD(lr=lambda step: log_lr[step].exp(), momentum=0.9),
    )


constant = [torch.full((20,), 0.1 * 1.4**i).log() for i in range(7)]
best = min(constant, key=lambda rates: sum(float(train(seed, rates).measure) for seed in range(6)))
log_lr = best.clone().requires_grad_()
outer = torch.optim.Adam([log_lr], lr=0.05)
for seed in range(50):
    outer.zero_grad()
    train(seed, log_lr).backward()
    outer.step()
before, after = (sum(float(train(s, r, test).measure) for s in range(500, 520)) / 20 for r in (best, log_lr))
print(f"test loss after 20 steps: {before:.3f} at the best constant rate, {after:.3f} at learned rates")
