"""MAML: initial weights from which five steps fit a sine that was never seen.

Finn et al., "Model-agnostic meta-learning" (ICML 2017). A task is a sine of its own amplitude and phase, ten
points to learn from and ten to be judged by. The meta tensors are the student's own parameters, which means
their initial values. With no steps to look ahead over, the same is ordinary training on all tasks at once:
the weights that a student would otherwise start from. What is printed is the error on new tasks.
Run: python docs/examples/maml.py
"""

import torch
from torch import nn
from torch.nn.functional import mse_loss

import l2t


def adapt(student, seed, steps):
    torch.manual_seed(seed)
    x, amplitude, phase = 10 * torch.rand(20, 1) - 5, 0.1 + 4.9 * torch.rand(1), 3 * torch.rand(1)
    y = amplitude * torch.sin(x - phase)
    return l2t.unroll(
        student,
        range(steps),
        lambda model, batch, step: mse_loss(model(x[:10]), y[:10]),
        lambda model: mse_loss(model(x[10:]), y[10:]),
        optimizer=l2t.optim.SGD(lr=0.02),
        meta=student.parameters(),
    )


def error(look_ahead, updates=80):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    outer = torch.optim.Adam(student.parameters(), lr=5e-3)
    for update in range(updates):
        outer.zero_grad()
        for seed in range(4 * update, 4 * update + 4):
            adapt(student, seed, look_ahead).backward()
        outer.step()
    return sum(float(adapt(student, seed, 5).measure) for seed in range(10_000, 10_030)) / 30


print(f"squared error after 5 steps: {error(0):.2f} from ordinary training, {error(5):.2f} from MAML")
