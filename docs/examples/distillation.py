"""Data distillation: ten images, drawn by gradients, that teach more than ten real ones.

Wang et al., "Dataset distillation" (2018), with the labels learned as well. The meta tensors are the images
and their labels, ten logits each. A student takes twenty steps on all ten, from new initial weights each
time. What is printed is the error on images that were never seen, of students from initial weights that
were never seen.
Run: python docs/examples/distillation.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import l2t

x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
torch.manual_seed(0)
x, y = x.float()[order := torch.randperm(len(x))] / 16, y[order]


def train(seed, images, labels):
    torch.manual_seed(seed)
    return l2t.unroll(
        nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)),
        range(20),
        lambda model, batch, step: cross_entropy(model(images), labels.softmax(dim=1)),
        lambda model: cross_entropy(model(x[:1000]), y[:1000]),
        optimizer=l2t.optim.SGD(lr=0.2, momentum=0.5),
    )


def error():
    runs = [train(seed, images.detach(), labels.detach()).weights.values() for seed in range(1000, 1005)]
    right = [((x[1000:] @ a.T + b).tanh() @ c.T + d).argmax(1) == y[1000:] for a, b, c, d in runs]
    return 100 - 100 * float(torch.stack(right).float().mean())


images = torch.stack([x[:1000][y[:1000] == digit][0] for digit in range(10)]).requires_grad_()
labels = (8 * torch.eye(10)).requires_grad_()
before, outer = error(), torch.optim.Adam([images, labels], lr=0.05)
for seed in range(50):
    outer.zero_grad()
    train(seed, images, labels).backward()
    outer.step()
print(f"test error: {before:.1f}% taught by ten real images, {error():.1f}% by ten learned ones")
