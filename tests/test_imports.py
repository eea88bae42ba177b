"""The house rules that the source itself can be asked about: who imports whom, and nothing runs a user's text."""

from __future__ import annotations

import ast
import configparser
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("data", "models", "engine", "search")  # each may import from itself and from those before it
DOORS = sorted(path.stem for path in ROOT.glob("*.py"))  # scripts; to import `search` gives the package, not the door

RUNS_CODE = {"eval", "exec", "__import__"}
UNPICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_YAML = {"full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}


def sources() -> list[Path]:
    """Every Python file of the project except the tests, as paths from its root."""
    files = [*ROOT.glob("*.py")]
    for folder in (*ROOMS, "bench"):
        files += (ROOT / folder).rglob("*.py")
    return sorted(path.relative_to(ROOT) for path in files)


def imports(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Line and full name of all that a file imports, at any depth: ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[: len(path.parts) - node.level] if node.level else ()
            origin = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called(node).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def called(node: ast.Call) -> str:
    """The name of what is called: ``torch.load``, ``eval``; of ``f(x).load`` only ``.load``."""
    if isinstance(node.func, ast.Attribute):
        owner = node.func.value
        return f"{owner.id if isinstance(owner, ast.Name) else ''}.{node.func.attr}"
    return node.func.id if isinstance(node.func, ast.Name) else ""


def rightward(path: Path, text: str) -> list[str]:
    """Imports against the order of the rooms, and of doors by anybody."""
    here = ROOMS.index(path.parts[0]) if path.parts[0] in ROOMS else len(ROOMS)
    found = []
    for line, name in imports(path, text):
        room = name.split(".")[0]
        if room in ROOMS:
            wrong = ROOMS.index(room) > here
            if path.parts[0] == "models" and room == "data":
                wrong = not f"{name}.".startswith(("data.structures.", "data.files."))
        else:
            wrong = room in DOORS
        if wrong:
            found.append(f"{path}:{line} imports {name}")
    return found


def unsafe(path: Path, text: str) -> list[str]:
    """What would run or unpickle what a user's file holds."""
    found = [
        f"{path}:{line} imports {name}"
        for line, name in imports(path, text)
        if name.split(".")[0] in UNPICKLES or name in {"torch.load", "builtins.eval", "builtins.exec"}
    ]
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        owner, _, method = name.rpartition(".")
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        given = [*map(ast.unparse, node.args), *keywords.values()]
        if (
            name.removeprefix("builtins.") in RUNS_CODE
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or (owner == "yaml" and method in UNSAFE_YAML)
            or (owner == "yaml" and method in {"load", "load_all"} and not any("Safe" in word for word in given))
            or keywords.get("allow_pickle") == "True"
        ):
            found.append(f"{path}:{node.lineno} calls {ast.unparse(node)}")
    return found


def test_imports_go_only_leftwards_and_nobody_imports_a_door() -> None:
    tests = [path.relative_to(ROOT) for path in (ROOT / "tests").glob("*.py")]
    assert [line for path in [*sources(), *tests] for line in rightward(path, (ROOT / path).read_text())] == []


def test_nothing_runs_or_unpickles_what_a_file_holds() -> None:
    assert [line for path in sources() for line in unsafe(path, (ROOT / path).read_text())] == []


def test_a_description_of_a_model_needs_no_torch() -> None:
    path = Path("models/spec.py")
    assert [name for _, name in imports(path, (ROOT / path).read_text()) if name.split(".")[0] == "torch"] == []


@pytest.mark.parametrize("door", DOORS)
def test_a_door_is_a_docstring_imports_and_one_call(door: str) -> None:
    tree = ast.parse((ROOT / f"{door}.py").read_text())
    assert f"{door}.py" in (ast.get_docstring(tree) or ""), "a door shows a command that works"
    inside = [type(node).__name__ for node in tree.body[1:]]
    assert set(inside) <= {"Import", "ImportFrom", "If"} and inside.count("If") == 1


def test_every_folder_of_a_room_is_a_package() -> None:
    folders = {path.parent for path in sources() if path.parts[0] in ROOMS}
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder / "__init__.py").is_file()] == []


def test_console_names_lead_to_functions() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for line in setup["options.entry_points"]["console_scripts"].split("\n")[1:]:
        module, function = line.split("=")[1].strip().split(":")
        assert module not in DOORS or module in ROOMS, f"{line}: a door cannot be imported once installed"
        assert callable(getattr(importlib.import_module(module), function)), line


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("data/check.py", "import models"),
        ("data/readers/yolo.py", "from ...engine import nms"),
        ("data/loader.py", "from engine.nms import nms"),
        ("data/loader.py", "def f():\n    import search.run"),
        ("models/network.py", "import data"),
        ("models/network.py", "from data.readers import read_split"),
        ("models/network.py", "importlib.import_module('engine.train')"),
        ("engine/train.py", "from search import space"),
        ("search/run.py", "import train"),
        ("bench/rank.py", "from detect import main"),
        ("tests/test_val.py", "import val"),
    ],
)
def test_a_rightward_import_is_found(path: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.DOORS", ["train", "search", "detect", "val"])
    assert rightward(Path(path), line)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("data/loader.py", "from data.structures import Batch"),
        ("data/readers/yolo.py", "from ..structures import Sample"),
        ("models/network.py", "from data.structures import Targets"),
        ("models/network.py", "from data import structures"),
        ("models/checkpoint.py", "from data.files import atomically"),
        ("models/ops/conv.py", "from models.registry import register_op"),
        ("engine/train.py", "from models.network import build"),
        ("train.py", "from engine.train import main"),
        ("search.py", "from search.run import main"),
    ],
)
def test_a_leftward_import_passes(path: str, line: str) -> None:
    assert rightward(Path(path), line) == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "builtins.exec(text)",
        "__import__(name)",
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_an_unsafe_line_is_found(line: str) -> None:
    assert unsafe(Path("data/check.py"), line)


@pytest.mark.parametrize(
    "line",
    [
        "network.eval()",
        "re.compile(text)",
        "torch.load(path, map_location='cpu', weights_only=True)",
        "yaml.safe_load(text)",
        "yaml.load(text, Loader=yaml.CSafeLoader)",
        "json.load(file)",
    ],
)
def test_a_safe_line_passes(line: str) -> None:
    assert unsafe(Path("data/check.py"), line) == []
