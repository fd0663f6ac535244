"""The house rules of docs/design.md section 5, as tests: a rule that nothing checks is a wish."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "l2t"
CORE = ROOT / "csrc"
PYTHON = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
NATIVE = sorted(path for path in CORE.rglob("*") if path.suffix in {".h", ".cpp", ".cu"})

# Layers of docs/design.md section 1, upper ones first; check.py and _native stand below all of them.
LAYERS = (
    (
        "what people run",
        {
            "tasks",
            "cli",
            "__main__",
            "report",
            "figures",
            "doctor",
            "compare",
            "contest",
            "baselines",
            "translation",
        },
    ),
    (
        "the walk through time",
        {
            "teach",
            "starts",
            "students",
            "augment",
            "teacher",
            "weight_net",
            "unroll",
            "run",
            "record",
            "steps",
            "measures",
            "ranks",
            "graph",
            "tape",
            "anchors",
            "states",
            "plan",
            "budget",
            "schedule",
            "curvature",
            "compiled",
            "preflight",
            "optim",
            "optim_base",
            "optim_torch",
        },
    ),
    ("the loss", {"loss", "functional", "linear", "weight", "autograd", "ops", "reference"}),
    ("below all", {"check", "files", "_native"}),
)
LEVEL = {name: level for level, (_, names) in enumerate(LAYERS) for name in names}


def code_of(path: Path) -> str:
    """The native source without comments and string literals, so that prose may name what code may not."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r'"(?:\\.|[^"\\\n])*"', '""', text)


def includes_of(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.M)


def unit_of(path: Path) -> str:
    """The name under which LAYERS knows a Python file: a package's files share the package's name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own_imports(path: Path) -> set[str]:
    """The modules of l2t that a file imports, wherever in the file, relative imports included."""
    depth = len(path.relative_to(PACKAGE).parts)
    package = ["l2t", *path.relative_to(PACKAGE).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("l2t.")}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else [])]
            if parts[:1] != ["l2t"]:
                continue
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    assert depth >= 1
    return found & LEVEL.keys()


def test_there_is_something_to_check() -> None:
    assert len(PYTHON) > 10
    assert len(NATIVE) > 8


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: str(path.relative_to(ROOT)))
def test_rule_1_nothing_of_torch_below_the_waist_and_python_in_one_file(path: Path) -> None:
    for name in includes_of(path):
        assert not re.match(r"(torch|ATen|c10)\b", name), name
        if re.match(r"(pybind11/|Python\.h)", name):
            assert path.name == "binding.cpp", f"{name} belongs in binding.cpp"
    assert not re.search(r"\b(at|c10|torch)::", code_of(path))


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: str(path.relative_to(ROOT)))
def test_rule_2_arithmetic_lives_in_math_and_math_is_pure(path: Path) -> None:
    room, code = path.relative_to(CORE).parts[0], code_of(path)
    if room == "math":
        assert not re.search(r"std::(thread|mutex|atomic|vector|string|unique_ptr|shared_ptr)", code)
        assert not re.search(r"\b(new|delete|malloc|free|__global__)\b", code)
    elif room in {"cpu", "cuda"}:
        assert not re.search(r"\b(?:std::)?(?:exp|exp2|expm1|log|log1p|log2|sqrt|tanh|pow)f?\s*\(", code)


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: str(path.relative_to(ROOT)))
def test_rule_3_the_core_neither_prints_nor_ends_the_process(path: Path) -> None:
    code = code_of(path)
    assert not re.search(r"\b(printf|fprintf|puts|abort|exit|_exit|quick_exit|terminate)\s*\(", code)
    assert not re.search(r"std::(cout|cerr|clog)\b|\bassert\s*\(", code)
    assert "<<<" not in code, (
        "a kernel is launched through the helper that takes a stream and checks the status"
    )


@pytest.mark.parametrize("path", [p for p in NATIVE if p.suffix != ".h"], ids=lambda path: path.name)
def test_rule_4_a_source_sees_its_own_declaration_first(path: Path) -> None:
    first = includes_of(path)[0]
    candidates = {f"{path.stem}.h", "l2t.h"}
    assert Path(first).name in candidates, f"{path.name} includes {first} first"


def test_rule_5_pointers_and_the_extension_only_in_ops() -> None:
    for path in PYTHON:
        name, text = unit_of(path), path.read_text()
        if name != "ops":
            assert "data_ptr" not in text, f"{path.name} knows a data pointer"
        if name not in {"ops", "doctor"}:
            assert "_native" not in own_imports(path), f"{path.name} imports the extension"


def raised_literals(path: Path) -> list[tuple[int, str]]:
    """Every ``raise X("...")`` of a file whose sentence is written on the spot."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            if ast.unparse(node.exc.func).startswith("check."):
                continue
            first = node.exc.args[0]
            if isinstance(first, ast.JoinedStr) or (
                isinstance(first, ast.Constant) and isinstance(first.value, str)
            ):
                found.append((node.lineno, ast.unparse(first)))
    return found


def test_rule_5_sentences_for_users_only_in_check() -> None:
    strays = [
        f"{p.name}:{line} {text}" for p in PYTHON if p.name != "check.py" for line, text in raised_literals(p)
    ]
    assert not strays, "\n".join(strays)


def pieces(node: ast.expr) -> list[str]:
    """The fixed parts of a string or f-string, white space folded."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [
            part.value
            for part in node.values
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        ]
    if isinstance(node, ast.BinOp):
        return pieces(node.left) + pieces(node.right)
    return []


def sentences() -> list[tuple[str, list[str]]]:
    """Each sentence of check.py as its fixed parts: what is raised, warned or returned as a message."""
    found = []
    for function in ast.walk(ast.parse((PACKAGE / "check.py").read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            call = (
                node.exc
                if isinstance(node, ast.Raise)
                else node.value
                if isinstance(node, ast.Return)
                else None
            )
            if isinstance(call, ast.Call) and call.args and pieces(call.args[0]):
                found.append((f"check.py:{node.lineno} {function.name}", pieces(call.args[0])))
    return found


def stands_in(text: str, fixed: list[str]) -> bool:
    """Whether ``text`` may be a stretch of the sentence of these fixed parts, with 10 of their characters."""

    def walk(rest: str, part: int, begin: int, seen: int) -> bool:
        tail = fixed[part][begin:]
        if tail.startswith(rest):
            return seen + len(rest) >= 10
        if not rest.startswith(tail):
            return False
        rest, seen = rest[len(tail) :], seen + len(tail)
        if seen >= 10 and "\0" not in rest and part + 1 == len(fixed):
            return True
        return part + 1 < len(fixed) and any(
            walk(rest[at:], part + 1, 0, seen) for at in range(len(rest) + 1)
        )

    return any(
        walk(text, part, begin, 0)
        for part in range(len(fixed))
        for begin, letter in enumerate(fixed[part])
        if letter == text[0]
    ) or any(
        walk(text[at:], part, 0, 0)
        for part in range(len(fixed))
        for at in range(1, len(text))
        if text[at] == fixed[part][0]
    )


def test_rule_5_every_sentence_is_provoked_by_a_test() -> None:
    """A sentence counts as provoked where a test asks for a stretch of it."""
    asked: set[str] = set()
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if path.name == Path(__file__).name:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                wild = re.sub(r"\\[dwsDWS][+*]?|\.[*+]\??|\[[^\]]*\][+*]?", "\0", node.value)
                plain = re.sub(r"\\(.)", r"\1", wild)
                asked |= {piece.strip(" ^$") for piece in re.split(r"[\0|()]", plain)}
    asked = {piece for piece in asked if 10 <= len(piece) <= 200}
    everything = sentences()
    assert len(everything) > 20
    unprovoked = [where for where, fixed in everything if not any(stands_in(piece, fixed) for piece in asked)]
    assert not unprovoked, "no test asks for these sentences:\n" + "\n".join(unprovoked)


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_rule_6_imports_go_downwards(path: Path) -> None:
    name = unit_of(path)
    if name in {"__init__", "__main__"}:
        return  # the public names and the entry point see everything
    assert name in LEVEL, f"{path} stands in no layer: add it to LAYERS and to docs/design.md"
    for imported in own_imports(path):
        assert LEVEL[imported] >= LEVEL[name], f"{name} imports {imported}, which stands above it"


def test_rule_7_the_design_names_every_file_and_only_existing_ones() -> None:
    tree = (ROOT / "docs" / "design.md").read_text().split("## 1.")[1].split("## 2.")[0]
    named = {Path(name).name for name in re.findall(r"[\w/]+\.(?:pyi|py|h|cpp|cu|typed)\b", tree)}
    existing = {path.name for path in PYTHON + NATIVE} | {"_native.pyi", "py.typed"}
    assert named == existing


@pytest.mark.parametrize("path", PYTHON + NATIVE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_opens_by_saying_what_is_here(path: Path) -> None:
    if path.suffix == ".py":
        assert ast.get_docstring(ast.parse(path.read_text())), "the module docstring is missing"
    else:
        assert path.read_text().lstrip().startswith(("//", "/*")), "the head comment is missing"
