"""The native core by itself: the C++ tests, plain and under sanitizers, and what the binding promises.

Which is: bits, strides, groups, ignored rows, logits at the ends of the number line, precision, forks,
refusals.

Not here: derivatives against autograd through the ops (test_ops.py), the build (test_build.py).
"""

from __future__ import annotations

import ast
import copy
import itertools
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import native_build
import pytest
import torch
import torch.nn.functional as F

from l2t import _native

ROOT = Path(__file__).resolve().parents[1]
POOL = [ROOT / "csrc" / "cpu" / "pool.cpp"]
CORE = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
FLAGS = [
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DL2T_ISA=baseline",
    "-DL2T_BASELINE_ONLY",
]
LINKS = {"sigmoid": _native.SIGMOID, "identity": _native.IDENTITY, "log-sigmoid": _native.LOG_SIGMOID}
STRUCTURES = ("full", "diagonal", "low rank")
INPUTS = ("logits", "weight", "left", "right", "bias", "scale")
INF, NAN = math.inf, math.nan
NONE, MEAN, SUM = 0, 1, 2
CONTIGUOUS = torch.contiguous_format


# ---- the C++ tests ----


@pytest.mark.parametrize(
    ("test", "sources", "sanitizer"),
    [
        pytest.param("test_math", [], "plain", id="math"),
        pytest.param("test_ops", CORE, "plain", id="ops"),
        pytest.param("test_ops", CORE, "address sanitizer", id="ops-address-sanitizer"),
        pytest.param("test_pool", POOL, "plain", id="pool"),
        pytest.param("test_pool", POOL, "thread sanitizer", id="pool-thread-sanitizer"),
    ],
)
def test_cpp(test, sources, sanitizer, tmp_path):
    native_build.require_sanitizer(sanitizer, tmp_path)
    # The sanitizers' checks take the optimiser minutes; nothing of a result hangs on it.
    flags = ["-O1" if sanitizer == "plain" else "-O0", *FLAGS, *native_build.SANITIZERS[sanitizer]]
    objects = native_build.compile_all([native_build.NATIVE / f"{test}.cpp", *sources], flags, tmp_path)
    ran = native_build.run(native_build.link(objects, sanitizer, tmp_path / test))
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "FAIL" not in ran.stdout
    assert ran.stdout.count("ok ") > 4


# ---- calls ----


class Call:
    """One problem for the four ops: inputs, a direction, and the ops as functions of the number of threads.

    Results are dictionaries, and full of NaN before the core writes them.
    """

    def __init__(
        self, structure="full", link="sigmoid", *, dtype=torch.float64, n=9, c=5, groups=1, rank=2, seed=0
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.structure, self.link, self.c, self.groups = dtype, structure, link, c, groups
        self.rank, self.ignore_index = rank if structure == "low rank" else 0, -100
        self.reduction, self.segments = NONE, 1
        rows = groups * c
        factor = (rows, self.rank) if structure == "low rank" else None
        shapes = {
            "logits": (n, c),
            "weight": (rows, c) if structure == "full" else (rows,),
            "left": factor,
            "right": factor,
            "bias": (rows,),
            "scale": (rows,),
        }
        scales = {"logits": 2, "weight": 1 / c if structure == "full" else 1, "left": 0.3, "right": 0.3}
        self.arithmetic = torch.float64 if dtype is torch.float64 else torch.float32
        dtypes = {"logits": dtype}
        self.inputs = {
            name: self.random(shape, scales.get(name, 1), dtypes.get(name)) for name, shape in shapes.items()
        }
        if structure == "full":
            self.inputs["weight"] += torch.eye(c, dtype=self.arithmetic).repeat(groups, 1)
        self.target = torch.randint(rows, (n,), generator=self.generator)
        self.v_loss = self.random((n,))
        self.direction = {
            name: self.random(shape, dtype=dtypes.get(name))
            for name, shape in {"v_loss": (n,), **shapes}.items()
        }

    def random(self, shape, scale=1.0, dtype=None):
        if shape is None:
            return None
        wide = scale * torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return wide.to(dtype or self.arithmetic)

    def replace(self, **changes):
        other = copy.copy(self)
        other.inputs = {name: changes.pop(name, value) for name, value in self.inputs.items()}
        other.__dict__.update(changes)
        return other

    def rows(self, threads):
        return [
            threads,
            False,
            None,
            self.inputs["logits"],
            self.target,
            *(self.inputs[name] for name in INPUTS[1:]),
            LINKS[self.link],
            self.ignore_index,
            self.groups,
            self.reduction,
            self.segments,
        ]

    def losses(self):
        return self.segments if self.reduction else len(self.target)

    def unwritten(self, *names):
        like = {"v_loss": self.v_loss, **self.inputs}
        return {
            name: None if like[name] is None else torch.full_like(like[name], NAN, memory_format=CONTIGUOUS)
            for name in names
        }

    def value(self, threads=1):
        loss = torch.full((self.losses(),), NAN, dtype=self.arithmetic)
        stats = torch.full((len(self.target), 3), NAN, dtype=self.arithmetic)
        d_logits = self.unwritten("logits")["logits"]
        _native.value(*self.rows(threads), loss, stats, d_logits)
        return {"loss": loss, "stats": stats, "logits": d_logits}

    def grad(self, threads=1):
        out = self.unwritten(*INPUTS)
        _native.grad(*self.rows(threads), self.value()["stats"], self.v_loss, *out.values())
        return out

    def grad_vjp(self, threads=1):
        out = self.unwritten("v_loss", *INPUTS)
        cotangents = [self.direction[name] for name in INPUTS]
        stats = self.value()["stats"]
        _native.grad_vjp(*self.rows(threads), stats, self.v_loss, *cotangents, *out.values())
        return out

    def grad_jvp(self, threads=1):
        out = self.unwritten(*INPUTS)
        tangents = [self.direction[name] for name in ("v_loss", *INPUTS)]
        stats = self.value()["stats"]
        _native.grad_jvp(*self.rows(threads), stats, self.v_loss, *tangents, *out.values())
        return out

    def all(self, threads=1):
        return {
            f"{op}, {name}": result
            for op in ("value", "grad", "grad_vjp", "grad_jvp")
            for name, result in getattr(self, op)(threads).items()
            if result is not None
        }


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert torch.equal(got[name], expected[name]), name
        assert not got[name].isnan().any(), name


every_structure = pytest.mark.parametrize("structure", STRUCTURES)
every_link = pytest.mark.parametrize("link", LINKS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


# ---- the same bits ----


@every_structure
@every_dtype
def test_the_number_of_threads_does_not_show_in_the_bits(structure, dtype):
    # Far above the grain, rows and classes in no multiple of a block, one class with most of the rows.
    call = Call(structure, dtype=dtype, n=700, c=601, groups=2, rank=3)
    call.target[: len(call.target) // 2] = 7
    call.target[::9] = call.ignore_index
    alone = call.all(threads=1)
    for threads in (2, 3, 8):
        assert_same_bits(call.all(threads), alone)


@every_structure
@every_dtype
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("c", [133, 2061], ids=["short rows", "long rows"])
def test_any_row_stride_and_alignment_gives_the_same_bits(structure, dtype, c, offset):
    call = Call(structure, dtype=dtype, n=20, c=c)
    padded = torch.full((20, c + 11), NAN, dtype=dtype)
    logits = padded[:, offset : offset + c]
    logits.copy_(call.inputs["logits"])
    assert_same_bits(call.replace(logits=logits).all(), call.all())


def test_a_row_stride_may_be_zero():
    call = Call(n=6)
    row = call.inputs["logits"][:1]
    assert_same_bits(
        call.replace(logits=row.expand(6, -1)).all(), call.replace(logits=row.repeat(6, 1)).all()
    )


@every_structure
@every_link
def test_a_stack_of_losses_is_as_many_calls(structure, link):
    groups, c = 3, 5
    call = Call(structure, link, n=24, c=c, groups=groups)
    call.target[:2] = call.ignore_index
    together = call.all()
    for group in range(groups):
        tables = slice(group * c, (group + 1) * c)
        mine = (call.target >= tables.start) & (call.target < tables.stop)
        part = {
            name: x if name in ("logits", "v_loss") or x is None else x[tables]
            for name, x in call.inputs.items()
        }
        alone = call.replace(
            groups=1,
            target=torch.where(mine, call.target - tables.start, call.ignore_index),
            direction={
                name: x if name in ("logits", "v_loss") or x is None else x[tables]
                for name, x in call.direction.items()
            },
            **part,
        ).all()
        for name, result in together.items():
            by_row = name.split(", ")[1] in ("logits", "v_loss", "loss", "stats")
            expected = alone[name][mine] if by_row else alone[name]
            assert torch.equal(result[mine] if by_row else result[tables], expected), name


# ---- rows that do not count ----


@every_structure
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_an_ignored_row_does_not_leak(structure, poison):
    call = Call(structure, n=12)
    ignored = torch.tensor([0, 4, 5, 11])
    call.target[ignored] = call.ignore_index
    clean = call.all()
    spoilt = call.replace(
        logits=call.inputs["logits"].index_fill(0, ignored, poison),
        v_loss=call.v_loss.index_fill(0, ignored, poison),
        direction={
            name: x.index_fill(0, ignored, poison) if name in ("logits", "v_loss") else x
            for name, x in call.direction.items()
        },
    )
    assert_same_bits(spoilt.all(), clean)
    for name, result in clean.items():
        if name.split(", ")[1] in ("logits", "v_loss", "loss", "stats"):
            assert not result[ignored].any(), name


@every_structure
@pytest.mark.parametrize("n", [0, 4], ids=["no rows", "all ignored"])
def test_without_a_row_every_gradient_is_zero(structure, n):
    call = Call(structure, n=n)
    call.target.fill_(call.ignore_index)
    for name, result in call.all().items():
        assert not result.any(), name  # NaN, the mark of what was not written, counts as true
        assert result.numel() or n == 0


def test_ignore_index_may_be_a_class():
    call = Call(n=8)
    call.target[:4] = 2
    ignored = call.replace(ignore_index=2)
    assert not ignored.value()["loss"][:4].any()
    assert not ignored.grad()["weight"][2].any()


# ---- logits at the ends of the number line ----


def identities(c, dtype):
    """Every way to say W = I."""
    zeros, ones = torch.zeros(c, 2, dtype=dtype), torch.ones(c, 2, dtype=dtype)
    return {
        "none": {"structure": "diagonal", "weight": None},
        "diagonal": {"structure": "diagonal", "weight": torch.ones(c, dtype=dtype)},
        "full": {"structure": "full", "weight": torch.eye(c, dtype=dtype)},
        "low rank": {"structure": "low rank", "rank": 2, "weight": None, "left": zeros, "right": ones},
    }


ROWS = {
    "minus infinity elsewhere": [0.3, -INF, -INF, 1.0],
    "minus infinity at the target": [-INF, 0.1, 2.0, 0.0],
    "one class left": [5.0, -INF, -INF, -INF],
    "nothing left": [-INF, -INF, -INF, -INF],
    "nan elsewhere": [0.0, NAN, 1.0, 2.0],
    "nan at the target": [NAN, 0.0, 1.0, 2.0],
    "plus infinity": [0.0, INF, 1.0, 2.0],
    "large": [1e4, -1e4, 9999.0, 3e4],
    "beyond exp": [0.0, 500.0, -2000.0, 800.0],
    "huge": [1e37, -1e37, 3e37, 0.0],
}


# A long row is gone over in pieces, of which some have nothing but minus infinities, or what is not a number.
PLACES = {"alone": None, "among others": 0.5, "among minus infinities": -INF}


def row_of(values, rest, dtype):
    """The values as a row, or far apart in a long one."""
    if rest is None:
        return torch.tensor([values], dtype=dtype)
    row = torch.full((1, 2500), rest, dtype=dtype)
    row[0, [1100, 1101, 2200, 2499]] = torch.tensor(values, dtype=dtype)
    return row


@every_dtype
@pytest.mark.parametrize("identity", ["none", "diagonal", "full", "low rank"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("row", ROWS)
def test_ends_of_the_number_line_as_cross_entropy(row, place, identity, dtype):
    logits = row_of(ROWS[row], PLACES[place], dtype)
    c = logits.shape[1]
    call = Call("diagonal", "identity", dtype=dtype, n=1, c=c).replace(
        bias=None, scale=None, left=None, right=None
    )
    changes = identities(c, dtype)[identity]
    target = torch.tensor([0 if c == 4 else 1100])
    call = call.replace(logits=logits, target=target, v_loss=torch.ones(1, dtype=dtype), **changes)
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, call.target, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), leaf, create_graph=True)
    torch.testing.assert_close(call.value()["loss"], expected.detach(), equal_nan=True)
    torch.testing.assert_close(call.value()["logits"], gradient.detach(), equal_nan=True)
    torch.testing.assert_close(call.grad()["logits"], gradient.detach(), equal_nan=True)

    direction = row_of([0.5, -1.0, 2.0, 0.25], None if c == 4 else 0.125, dtype)
    (second,) = torch.autograd.grad((gradient * direction).sum(), leaf)
    call.direction = dict.fromkeys(call.direction) | {"logits": direction}
    for op in ("grad_vjp", "grad_jvp"):
        torch.testing.assert_close(getattr(call, op)()["logits"], second, equal_nan=True)


@pytest.mark.parametrize("structure", ["full", "diagonal"])
@every_link
def test_a_class_of_logit_minus_infinity_is_a_class_that_is_not_there(structure, link):
    """If it has no weight either: every result for the other classes is that of a call without it."""
    call = Call(structure, link, n=12, c=5)
    gone, kept = 3, torch.tensor([0, 1, 2, 4])
    call.target = kept[torch.randint(4, (12,), generator=call.generator)]
    call.inputs["logits"][:, gone] = -INF
    if structure == "full":
        call.inputs["weight"][:, gone] = call.direction["weight"][:, gone] = 0

    def without(name, x):
        if x is None or name in ("v_loss", "loss", "stats"):
            return x
        if name == "logits":
            return x[:, kept].contiguous()
        return x[kept][:, kept].contiguous() if x.dim() == 2 else x[kept]

    less = call.replace(
        c=4,
        target=torch.searchsorted(kept, call.target),
        direction={name: without(name, x) for name, x in call.direction.items()},
        **{name: without(name, x) for name, x in call.inputs.items()},
    )
    expected = less.all()
    for name, result in call.all().items():
        part = without(name.split(", ")[1], result)
        torch.testing.assert_close(
            part, expected[name], rtol=1e-12, atol=1e-12, msg=lambda m, at=name: f"{at}: {m}"
        )


# ---- precision ----


def by_torch(call):
    """The ops' results by autograd on the definition in the dtype of the call: the yardstick of precision."""
    inputs = {name: x.clone().requires_grad_() for name, x in call.inputs.items() if x is not None}
    leaves = list(inputs.values())
    log_p = F.log_softmax(inputs["logits"], -1)
    if call.structure == "full":
        u = (inputs["weight"][call.target] * log_p).sum(-1)
    else:
        u = inputs["weight"][call.target] * log_p.gather(1, call.target[:, None])[:, 0]
    if call.structure == "low rank":
        u = u + (inputs["left"][call.target] * (log_p @ inputs["right"])).sum(-1)
    u = u + inputs["bias"][call.target]
    phi = {"sigmoid": torch.sigmoid, "identity": lambda x: x, "log-sigmoid": F.logsigmoid}[call.link]
    loss = -inputs["scale"][call.target] * phi(u)
    gradients = torch.autograd.grad((call.v_loss * loss).sum(), leaves, create_graph=True)
    total = sum((call.direction[name] * g).sum() for name, g in zip(inputs, gradients, strict=True))
    second = torch.autograd.grad(total, leaves)
    return {
        "value, loss": loss.detach(),
        **{f"grad, {name}": g.detach() for name, g in zip(inputs, gradients, strict=True)},
        **{f"grad_vjp, {name}": g for name, g in zip(inputs, second, strict=True)},
    }


def in_double(call):
    wide = {name: x if x is None else x.double() for name, x in call.inputs.items()}
    direction = {name: x if x is None else x.double() for name, x in call.direction.items()}
    return call.replace(
        dtype=torch.float64,
        arithmetic=torch.float64,
        v_loss=call.v_loss.double(),
        direction=direction,
        **wide,
    )


@every_structure
@every_link
@pytest.mark.parametrize("logits", ["random", "offset", "wide", "trained"])
def test_float32_is_not_less_precise_than_torch(structure, link, logits):
    """The error of each result against float64, ours over torch's: the geometric mean over an op's results.

    And over seeds: one ratio is luck with roundings, anywhere between a tenth and ten.
    """
    ratios = {"value": [], "grad": [], "grad_vjp": []}
    for seed, c in itertools.product(range(6), (10, 200, 1500)):
        call = Call(structure, link, dtype=torch.float32, n=32, c=c, seed=seed)
        z = call.inputs["logits"]
        if logits == "offset":
            z += 1e4
        if logits == "wide":
            z *= 10
        if logits == "trained":
            z[torch.arange(32), call.target] += 12
        ours, theirs = call.all(), by_torch(call)
        for name, exact in by_torch(in_double(call)).items():
            floor = torch.finfo(torch.float32).eps * exact.norm() / 4
            error, allowed = ((x[name].double() - exact).norm() + floor for x in (ours, theirs))
            ratios[name.split(",")[0]].append(math.log(error / allowed))
    for op, logarithms in ratios.items():
        ratio = math.exp(sum(logarithms) / len(logarithms))
        print(f"{op}: {ratio:.2f}")
        assert ratio < 1.5, op


# ---- processes and threads ----

FORK = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
from test_native import Call, assert_same_bits
torch.set_num_threads(1)  # OpenMP's threads, unlike ours, do not survive a fork
call = Call(n=400, c=1001)
alone, before = call.all(threads=1), call.all(threads=3)
child = os.fork()
if child == 0:
    after = call.all(threads=3)
    assert_same_bits(after, alone)
    grandchild = os.fork()
    if grandchild == 0:
        assert_same_bits(call.all(threads=2), alone)
        os._exit(7)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert_same_bits(call.all(threads=3), alone)
sys.exit(code)
"""

# Only the core in the thread: torch's own calls abort the process here, in Python before 3.14.
DAEMON = """
import sys, threading
sys.path.insert(0, {tests!r})
from test_native import INPUTS, Call, _native
call, running = Call(n=400, c=1001), threading.Event()
stats, out = call.value()["stats"], call.unwritten(*INPUTS)
arguments = [*call.rows(3), stats, call.v_loss, *out.values()]
def work():
    while True:
        _native.grad(*arguments)
        running.set()
threading.Thread(target=work, daemon=True).start()
assert running.wait(60)
"""


def run_python(script, expected):
    """In tests/, where `import l2t` finds the installed package."""
    tests = Path(__file__).parent
    ran = subprocess.run(
        [sys.executable, "-c", script.format(tests=str(tests))],
        cwd=tests,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == expected, ran.stderr


def test_the_pool_works_in_a_forked_child():
    run_python(FORK, 7)


def test_a_process_ends_while_its_threads_compute():
    run_python(DAEMON, 0)


def test_several_python_threads_at_a_time():
    call = Call("low rank", n=300, c=503)
    alone = call.all()
    faults = []

    def work():
        for _ in range(5):
            try:
                assert_same_bits(call.all(threads=2), alone)
            except AssertionError as error:
                faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_the_gil_is_released():
    row = torch.randn(1, 1000, dtype=torch.float64)
    call = Call(n=1, c=1000, structure="diagonal").replace(
        logits=row.expand(200_000, -1), target=torch.zeros(200_000, dtype=torch.int64)
    )
    span, ticks = [], []

    def work():
        span.append(time.perf_counter())
        call.value()
        span.append(time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    length = span[1] - span[0]
    inside = [t for t in ticks if span[0] + 0.1 * length < t < span[1] - 0.1 * length]
    assert length > 0.02
    assert inside, f"nothing else ran during {length:.3f} s"


# ---- the binding ----


def test_the_stub_has_every_function_and_argument():
    tree = ast.parse((ROOT / "l2t" / "_native.pyi").read_text())
    functions = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    numbers = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    assert len(numbers) == 3
    public = {name for name in dir(_native) if not name.startswith("_")}
    assert public == functions.keys() | numbers
    for name in ("check_target", "cuda_scale", "value", "grad", "grad_vjp", "grad_jvp"):
        expected = len(functions[name].posonlyargs)
        with pytest.raises(TypeError, match=rf"takes {expected} arguments, got 1"):
            getattr(_native, name)(0)


def test_build_info():
    info = _native.build_info()
    assert info.keys() == {
        "version",
        "compiler",
        "build_type",
        "instruction_sets",
        "cuda_architectures",
        "openmp",
    }
    assert not info["openmp"]
    assert info["build_type"] == "Release"
    assert info["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")
    assert "baseline" in info["instruction_sets"].split()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ([0, 9, -100], -1),
        ([0, 10, -100], 1),
        ([3, -1], 1),
        ([-5], 0),
        ([], -1),
        ([2**62], 0),
        ([-(2**63)], 0),
    ],
)
def test_check_target(target, expected):
    tensor = torch.tensor(target, dtype=torch.int64)
    assert _native.check_target(tensor, 10, -100) == expected


THREADS, ATOMICS, WORKSPACE, LOGITS, TARGET, WEIGHT, LEFT, RIGHT, BIAS, SCALE = range(10)
LINK, IGNORE_INDEX, GROUPS, REDUCTION, SEGMENTS = range(10, 15)
MISFIT = "does not fit the other arguments in shape, dtype, device or contiguity"


def wide(*shape, dtype=torch.float64):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("structure", "changes", "sentence"),
    [
        ("full", {LINK: 3}, "link must be 0 (sigmoid), 1 (identity) or 2 (log-sigmoid)"),
        ("full", {THREADS: 0}, "threads must be at least 1"),
        ("full", {GROUPS: 0, BIAS: None, SCALE: None, WEIGHT: wide(0, 5)}, "c and groups at least 1"),
        ("full", {REDUCTION: SUM, SEGMENTS: 2}, "losses must divide n"),
        ("full", {REDUCTION: SUM, SEGMENTS: 0}, "losses must divide n"),
        ("low rank", {RIGHT: None}, "left and right must not be null for a low-rank weight"),
        (
            "full",
            {TARGET: torch.full((9,), 5)},
            "every target must be ignore_index or lie in [0, groups * c)",
        ),
        ("full", {LOGITS: None}, f"logits {MISFIT}"),
        ("full", {LOGITS: wide(9, 5, dtype=torch.int64)}, f"logits {MISFIT}"),
        ("full", {LOGITS: wide(9, 5, 1)}, f"logits {MISFIT}"),
        ("full", {LOGITS: wide(5, 9).t()}, f"logits {MISFIT}"),
        ("full", {LOGITS: wide(9, 4)}, f"weight {MISFIT}"),
        ("full", {TARGET: torch.zeros(9, dtype=torch.int32)}, f"target {MISFIT}"),
        ("full", {TARGET: torch.zeros(8, dtype=torch.int64)}, f"target {MISFIT}"),
        ("full", {TARGET: torch.zeros(18, dtype=torch.int64)[::2]}, f"target {MISFIT}"),
        ("full", {WEIGHT: wide(5, 5, dtype=torch.float32)}, f"weight {MISFIT}"),
        ("full", {WEIGHT: wide(5, 6)}, f"weight {MISFIT}"),
        ("full", {WEIGHT: torch.ones(5, 5, dtype=torch.float64).triu().t()}, f"weight {MISFIT}"),
        ("diagonal", {WEIGHT: wide(4)}, f"weight {MISFIT}"),
        ("low rank", {LEFT: wide(5)}, f"left {MISFIT}"),
        ("low rank", {RIGHT: wide(5, 3)}, f"right {MISFIT}"),
        ("full", {BIAS: wide(10)}, f"bias {MISFIT}"),
        ("full", {BIAS: torch._efficientzerotensor(5, dtype=torch.float64)}, f"bias {MISFIT}"),
        ("full", {SCALE: wide(5, 1)}, f"scale {MISFIT}"),
    ],
)
def test_a_wrong_call_is_refused_by_every_op(structure, changes, sentence):
    call = Call(structure)
    arguments = call.rows(1)
    for at, value in changes.items():
        arguments[at] = value
    losses = arguments[SEGMENTS] if arguments[REDUCTION] else 9
    stats, loss, v_loss = wide(9, 3).fill_(5), wide(losses).fill_(5), wide(losses)
    for op, rest in (
        (_native.value, [loss, stats, None]),
        (_native.grad, [stats, v_loss, *[None] * 6]),
        (_native.grad_vjp, [stats, v_loss, *[None] * 13]),
        (_native.grad_jvp, [stats, v_loss, *[None] * 13]),
    ):
        with pytest.raises(ValueError) as refused:
            op(*arguments, *rest)
        assert sentence in str(refused.value)
        assert str(refused.value).startswith("l2t core: ")
    assert (loss == 5).all()
    assert (stats == 5).all()


def test_missing_and_misfit_buffers_are_refused():
    call = Call("diagonal")
    rows, stats, loss, line = call.rows(1), wide(9, 3), wide(9), wide(5)
    with pytest.raises(ValueError, match="must not be null where there are rows"):
        _native.value(*rows, None, stats, None)
    with pytest.raises(ValueError, match="must not be null where there are rows"):
        _native.grad_vjp(*rows, None, loss, *[None] * 13)
    with pytest.raises(ValueError, match=f"stats {MISFIT}"):
        _native.value(*rows, loss, wide(9, 2), None)
    with pytest.raises(ValueError, match=f"loss {MISFIT}"):
        _native.value(*rows, wide(()), stats, None)
    with pytest.raises(ValueError, match=f"d_logits.* {MISFIT}"):
        _native.value(*rows, loss, stats, wide(9, 10)[:, :5])
    for op, at, count in ((_native.grad, 2, 6), (_native.grad_vjp, 2, 13), (_native.grad_jvp, 9, 13)):
        arguments: list = [None] * count
        arguments[at] = wide(5, 1)
        with pytest.raises(ValueError, match=MISFIT):
            op(*rows, stats, loss, *arguments)
        arguments[at] = line
        with pytest.raises(ValueError, match=MISFIT):
            op(*rows, stats, loss, *arguments)


def test_only_tensors_are_read():
    for wrong in (0, "0", [1.0]):
        arguments = Call().rows(1)
        arguments[LOGITS] = wrong
        with pytest.raises((RuntimeError, TypeError)):
            _native.value(*arguments, wide(9), wide(9, 3), None)
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda x: _native.check_target(x, 5, -100))(torch.zeros(2, 3, dtype=torch.int64))


def test_scaling_on_cuda_refuses_what_is_elsewhere():
    with pytest.raises(ValueError, match=f"v_loss {MISFIT}"):
        _native.cuda_scale(wide(3, 4), wide(3))


def test_settings_must_be_whole_numbers():
    for wrong, error in (("0", TypeError), (0.0, TypeError), (2**64, OverflowError)):
        arguments = Call().rows(1)
        arguments[LINK] = wrong
        with pytest.raises(error):
            _native.value(*arguments, wide(9), wide(9, 3), None)
