"""`python tests/mutations.py [N ...]`: 25 mistakes in the code, each of which its tests must catch.

A mistake is one operator, number or name changed at a place that a seed draws: in decoding,
metrics, checkpoints and readers. The room is copied with the mistake into a scratch tree, and the
quick tests of the room run there. Prints a line a mistake; status 1: one was not caught. All take
half an hour; numbers choose some of them, `--list` only shows them.
"""

import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HOME, SEED = Path(__file__).parent.parent, 18
ROOMS = {  # how many mistakes in each, and the tests of it
    "decode.py": (6, ["test_decode.py"]),
    "metrics.py": (6, ["test_metrics.py"]),
    "models.py": (3, ["test_models.py", "test_strangers.py"]),
    "models_config.py": (2, ["test_strangers.py", "test_models.py"]),
    "data.py": (4, ["test_data.py", "test_data_captions.py", "test_names.py"]),
    "files.py": (4, ["test_text_files.py", "test_files.py", "test_models.py", "test_hub.py"]),
}  # fmt: skip
CHECKS = ("strict", "exist_ok", "missing_ok", "ignore_errors", "ignore_cleanup_errors")
SWAPPED = {
    ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def places(tree: ast.Module) -> list[ast.AST]:
    """Where a mistake can be made: in functions, but not in messages, defaults and annotations."""
    found = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        skipped = {
            id(node)
            for part in ast.walk(function)
            if isinstance(part, ast.Raise | ast.JoinedStr | ast.arguments | ast.AnnAssign)
            or (isinstance(part, ast.keyword) and part.arg in CHECKS)
            for node in ast.walk(part)
        }
        for node in ast.walk(function):
            if id(node) not in skipped and mutable(node):
                found.append(node)
    return list({id(node): node for node in found}.values())


def mutable(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        return type(node.ops[0]) in SWAPPED
    if isinstance(node, ast.BinOp | ast.BoolOp):
        return type(node.op) in SWAPPED
    return isinstance(node, ast.Constant) and type(node.value) in (int, bool, float)


def mutate(node: ast.AST) -> str:
    """Makes the mistake; -> what it is."""
    before = ast.unparse(node)
    if isinstance(node, ast.Compare):
        node.ops[0] = SWAPPED[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.BoolOp):
        node.op = SWAPPED[type(node.op)]()
    elif isinstance(node.value, bool):
        node.value = not node.value
    else:
        node.value += 1
    return f"{before}  ->  {ast.unparse(node)}"


def mistakes() -> Iterator[tuple[str, str, str, list[str]]]:
    """(room, the mistake, the room's text with it, its tests), the same ones each time."""
    for room, (count, tests) in ROOMS.items():
        chance, text = random.Random(f"{SEED}/{room}"), (HOME / "tinyvl" / room).read_text()
        for number in chance.sample(range(len(places(ast.parse(text)))), count):
            tree = ast.parse(text)
            node = places(tree)[number]
            line = node.lineno
            yield room, f"line {line}: {mutate(node)}", ast.unparse(tree), tests


def caught(room: str, text: str, tests: list[str]) -> bool:
    """Whether one of the tests fails where the room has this text."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("tinyvl", "tests", "data", "pyproject.toml", "README.md"):
            copy = shutil.copytree if (HOME / name).is_dir() else shutil.copy
            copy(HOME / name, Path(scratch) / name)
        (Path(scratch) / "tinyvl" / room).write_text(text)
        command = [sys.executable, "-m", "pytest", "-q", "-x", *(f"tests/{test}" for test in tests)]
        env = os.environ | {"PYTHONPATH": scratch}
        try:
            done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, timeout=3600)
        except subprocess.TimeoutExpired:  # it hangs
            return True
    assert done.returncode in (0, 1, 2), done.stdout.decode()  # 2: it cannot even be imported
    return done.returncode != 0


if __name__ == "__main__":
    chosen, missed = {int(n) for n in sys.argv[1:] if n.isdigit()}, 0
    for number, (room, mistake, text, tests) in enumerate(mistakes(), 1):
        if chosen and number not in chosen:
            continue
        if "--list" in sys.argv:
            print(f"{number:>2} {room}, {mistake}")
            continue
        good = caught(room, text, tests)
        missed += not good
        print(f"{number:>2} {'caught' if good else 'MISSED'}  {room}, {mistake}", flush=True)
    sys.exit(int(missed > 0))
