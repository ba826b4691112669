"""The house rules that a machine can hold: reading order is import order, and files and functions stay short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "mlm_dist"

# A module imports only modules that stand before it here.
LADDER = (
    "yaml_tree schema signals cpu_products world background watchdog pace vocab fetch redaction logs manifest samples "
    "cache remote shards packing lanes mixture cursor loader batch_size stream masking linear_loss mlm cpu_attention "
    "cpu_layer gpu_attention encoder huggingface models pieces adam muon optim schedule compiling engine_config "
    "engine metrics predictions run_folder mirror alerts tracker history charts panels notes report checkpoint saver "
    "evaluate config assembly start prepare train card export"
).split()
ONLY_IN = {"webdataset": ("shards",), "wandb": ("mirror",), "deepspeed": ("engine", "checkpoint")}
AROUND = ("launch", "shards", "tests", "benchmarks")  # folders beside the package, which it never imports
MEASURED = (PACKAGE, "launch", "shards")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.Module) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, name taken from it or None) of every import, inside functions too; relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, (PACKAGE if node.level else "", node.module)))
            for alias in node.names:
                yield node.lineno, module, alias.name
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value), None


def imported_modules(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import; `from mlm_dist import x` and `from . import x` are of mlm_dist.x."""
    for line, module, name in imports(tree):
        yield line, f"{module}.{name}" if module == PACKAGE and name else module


def ladder_complaints(root: Path, ladder: list[str]) -> Iterator[str]:
    """What the package's modules import that they may not."""
    for path in sorted((root / PACKAGE).glob("**/*.py")):
        module = ".".join(path.relative_to(root / PACKAGE).with_suffix("").parts)
        if module != "__init__" and module not in ladder:
            yield f"{path.relative_to(root)}: not in the ladder"
            continue
        above = ladder if module == "__init__" else ladder[: ladder.index(module)]
        for line, dotted in imported_modules(parse(path)):
            top, _, rest = dotted.partition(".")
            if top in AROUND:
                yield f"{path.relative_to(root)}:{line}: imports {dotted}, which stands beside the package"
            elif top == PACKAGE and rest.split(".")[0] not in above:
                yield f"{path.relative_to(root)}:{line}: imports {dotted}, which does not stand above it"


def library_complaints(root: Path) -> Iterator[str]:
    """Libraries that are imported elsewhere than in the one or two modules that wrap them."""
    for path in sorted(path for folder in MEASURED for path in (root / folder).glob("**/*.py")):
        for line, dotted in imported_modules(parse(path)):
            library = dotted.split(".")[0]
            home = [root / PACKAGE / f"{module}.py" for module in ONLY_IN.get(library, ())]
            if home and path not in home:
                yield f"{path.relative_to(root)}:{line}: imports {library}"


def size_complaints(root: Path) -> Iterator[str]:
    """Files and functions that are too long."""
    for path in sorted(path for folder in MEASURED for path in (root / folder).glob("**/*.py")):
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > MAX_FILE_LINES:
            yield f"{path.relative_to(root)}: {count} lines"
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = node.end_lineno - node.lineno + 1
                if count > MAX_FUNCTION_LINES:
                    yield f"{path.relative_to(root)}:{node.lineno}: {node.name} has {count} lines"


def getattr_complaints(root: Path) -> Iterator[str]:
    """`getattr(cfg, "x", default)`: a default belongs in the dataclass, and a misspelt name must not pass."""
    for path in sorted(path for folder in MEASURED for path in (root / folder).glob("**/*.py")):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                if len(node.args) == 3 and last_name(node.args[0]).split("_")[-1] in ("cfg", "config"):
                    yield f"{path.relative_to(root)}:{node.lineno}: getattr with a default on a config"


def last_name(node: ast.expr) -> str:
    """The name in `name` or `x.name`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def complaints(root: Path, ladder: list[str]) -> list[str]:
    return [
        *ladder_complaints(root, ladder),
        *library_complaints(root),
        *size_complaints(root),
        *getattr_complaints(root),
    ]


# ---- the project


def test_the_house_is_in_order() -> None:
    assert (ROOT / PACKAGE / "schema.py").is_file()
    assert complaints(ROOT, LADDER) == []


# ---- the checks themselves

CLEAN = {
    "mlm_dist/__init__.py": "from mlm_dist.mlm import MLM\n",
    "mlm_dist/schema.py": "import yaml\nfrom torch.testing import shards\n",
    "mlm_dist/shards.py": "import webdataset as wds\nfrom mlm_dist.schema import load\n",
    "mlm_dist/mlm.py": "from mlm_dist import schema, shards\nx = getattr(schema, 'y', 1)\ny = getattr(cfg, name)\n",
    "mlm_dist/engine.py": "import deepspeed.ops\nfrom . import mlm\nfrom .schema import load\nimport mlm_dist.shards\n",
    "launch/go.py": "from mlm_dist import engine\n",
    "tests/test_x.py": "import wandb\n" + "\n" * 500,
}
SMALL_LADDER = ["schema", "shards", "mlm", "engine"]


def plant(root: Path, files: dict[str, str]) -> list[str]:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    return complaints(root, SMALL_LADDER)


def test_a_clean_house_passes(tmp_path: Path) -> None:
    assert plant(tmp_path, CLEAN) == []


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("mlm_dist/schema.py", "import mlm_dist.mlm\n", ":1: imports mlm_dist.mlm, which does not stand above it"),
        (
            "mlm_dist/schema.py",
            "import mlm_dist.mlm as m, os\n",
            ":1: imports mlm_dist.mlm, which does not stand above it",
        ),
        (
            "mlm_dist/schema.py",
            "\nfrom mlm_dist import mlm\n",
            ":2: imports mlm_dist.mlm, which does not stand above it",
        ),
        (
            "mlm_dist/schema.py",
            "from mlm_dist.mlm import MLM\n",
            ":1: imports mlm_dist.mlm, which does not stand above it",
        ),
        ("mlm_dist/schema.py", "from . import mlm\n", ":1: imports mlm_dist.mlm, which does not stand above it"),
        ("mlm_dist/schema.py", "from .mlm import MLM\n", ":1: imports mlm_dist.mlm, which does not stand above it"),
        (
            "mlm_dist/schema.py",
            "def f():\n    from .mlm import M\n",
            ":2: imports mlm_dist.mlm, which does not stand above it",
        ),
        (
            "mlm_dist/schema.py",
            "import_module('mlm_dist.mlm')\n",
            ":1: imports mlm_dist.mlm, which does not stand above it",
        ),
        ("mlm_dist/mlm.py", "import mlm_dist.mlm\n", ":1: imports mlm_dist.mlm, which does not stand above it"),
        ("mlm_dist/mlm.py", "from mlm_dist import MLM\n", ":1: imports mlm_dist.MLM, which does not stand above it"),
        ("mlm_dist/mlm.py", "import mlm_dist\n", ":1: imports mlm_dist, which does not stand above it"),
        ("mlm_dist/mlm.py", "from launch.go import x\n", ":1: imports launch.go, which stands beside the package"),
        ("mlm_dist/mlm.py", "import shards\n", ":1: imports shards, which stands beside the package"),
        ("mlm_dist/__init__.py", "import tests\n", ":1: imports tests, which stands beside the package"),
        ("mlm_dist/new.py", "", ": not in the ladder"),
        ("mlm_dist/sub/mlm.py", "", ": not in the ladder"),
        ("mlm_dist/mlm.py", "def f():\n    import wandb.sdk\n", ":2: imports wandb"),
        ("mlm_dist/mlm.py", "from deepspeed.ops import adam\n", ":1: imports deepspeed"),
        ("launch/go.py", "import deepspeed\n", ":1: imports deepspeed"),
        ("shards/shards.py", "import webdataset\n", ":1: imports webdataset"),
        ("mlm_dist/mlm.py", "x = 1\n" * 401, ": 401 lines"),
        ("shards/build.py", "def f():\n" + "    x = 1\n" * 60, ":1: f has 61 lines"),
        ("launch/go.py", "class A:\n    async def f():\n" + "        x = 1\n" * 60, ":2: f has 61 lines"),
        ("mlm_dist/mlm.py", "getattr(cfg, 'x', 1)\n", ":1: getattr with a default on a config"),
        ("mlm_dist/mlm.py", "getattr(self.run_config, 'x', 1)\n", ":1: getattr with a default on a config"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, name: str, source: str, complaint: str) -> None:
    assert plant(tmp_path, {**CLEAN, name: source}) == [name + complaint]


def test_the_measures_are_inclusive(tmp_path: Path) -> None:
    files = {"mlm_dist/mlm.py": "x = 1\n" * 400, "shards/build.py": "def f():\n" + "    x = 1\n" * 59}
    assert plant(tmp_path, {**CLEAN, **files}) == []
