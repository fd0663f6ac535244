"""Data reweighting: each training image learns what it is worth, where four labels in ten are random.

Ren et al., "Learning to reweight examples for robust deep learning" (ICML 2018), through the student's whole
training rather than one step of it. The meta tensor is a number for each training image; a hundred images
with their right labels judge. What is printed is the error on others, of students from new initial weights:
taught by all images alike, by the hundred right ones alone, and by all with what each is worth.
Run: python docs/examples/reweighting.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import l2t

x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
torch.manual_seed(0)
x, y = x.float()[order := torch.randperm(len(x))] / 16, y[order]
given = torch.where((torch.rand(len(y)) < 0.4) & (torch.arange(len(y)) < 1000), torch.randint_like(y, 10), y)


def train(seed, worth, begin=0, end=1000):
    torch.manual_seed(seed)
    return l2t.unroll(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        torch.randint(begin, end, (100, 64)),
        lambda model, i, step: (worth[i] * cross_entropy(model(x[i]), given[i], reduction="none")).mean(),
        lambda model: cross_entropy(model(x[1000:1100]), y[1000:1100]),
        optimizer=l2t.optim.SGD(lr=0.1, momentum=0.9),
    )


def error(*how):
    runs = [train(seed, *how).weights.values() for seed in range(1000, 1005)]
    right = [((x[1100:] @ a.T + b).relu() @ c.T + d).argmax(1) == y[1100:] for a, b, c, d in runs]
    return 100 - 100 * float(torch.stack(right).float().mean())


worth, alike = torch.zeros(1000, requires_grad=True), torch.ones(1100)
outer = torch.optim.Adam([worth], lr=0.3)
for seed in range(20):
    outer.zero_grad()
    train(seed, worth.sigmoid()).backward()
    outer.step()
few, worthy = error(alike, 1000, 1100), error(worth.detach().sigmoid())
print(f"test error: {error(alike):.1f}% alike, {few:.1f}% the right ones alone, {worthy:.1f}% reweighted")
