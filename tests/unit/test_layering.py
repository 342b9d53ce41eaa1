"""Imports run one way, and no file or function holds two ideas."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH_ONLY = [
    "samplers",
    "steps",
    "rounding",
    "parameters",
    "shards",
    "fingerprints",
    "evaluators",
    "leaf_scratch",
    "interrupts",
    "estimators",
    "transforms",
    "optimizer",
    "structured",
    "sampler_records",
    "scaled",
    "sparse",
    "chunks",
    "layout",
    "magnitudes",
    "flipout",
    "rowwise",
    "trajectory",
    "updates",
    "dense",
    "lockstep",
    "outside_use",
]
PACKAGE = ROOT / "mezo_lightning"
CORE = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for name in TORCH_ONLY
    for path in ([PACKAGE / f"{name}.py"] if (PACKAGE / f"{name}.py").exists() else (PACKAGE / name).rglob("*.py"))
)
PARTS = {path.stem for path in PACKAGE.iterdir()} - {"__init__", "assets"}
BLOCKED = ["lightning", "pytorch_lightning", "deepspeed", "transformers", "datasets", "peft", "numpy", "jsonargparse"]
LIBRARY = sorted(path for folder in ("mezo_lightning", "rewards") for path in (ROOT / folder).rglob("*.py"))


class WithoutTypeChecking(ast.NodeTransformer):
    """Leaves out what is imported for annotations alone."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def imported(path: Path, at_runtime: bool = False) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(WithoutTypeChecking().visit(tree) if at_runtime else tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.slow
def test_the_core_imports_and_runs_with_torch_alone():
    script = f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None
import importlib, warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, about numpy
    import torch
for name in {CORE}:
    importlib.import_module("mezo_lightning." + name)
from mezo_lightning.estimators import CentralDifference
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.optimizer import MeZO
model = torch.nn.Linear(3, 2)
mezo = MeZO(model.named_parameters(), lr=1e-2)
x = torch.randn(4, 3)
evaluate = LeafScratch(model, mezo.space)(lambda: model(x).square().mean(1))
mezo.step(estimate=CentralDifference().estimate(evaluate, seed=1))
print(*sorted(name for name in sys.modules if name.startswith("mezo_lightning.")))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == {f"mezo_lightning.{name}" for name in CORE}


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_torch_the_standard_library_and_itself(name: str):
    # lockstep.py takes greenlet, and is imported when it is asked for.
    allowed = {
        "torch",
        *(["greenlet"] if name == "lockstep" else []),
        *(f"mezo_lightning.{other}" for other in TORCH_ONLY),
    }
    path = PACKAGE.joinpath(*name.split("."))
    for module in imported(path / "__init__.py" if path.is_dir() else path.with_suffix(".py")):
        top = module.split(".")[0]
        inside = module == "mezo_lightning" or any(module == a or module.startswith(f"{a}.") for a in allowed)
        assert top in sys.stdlib_module_names or inside, module


def test_no_part_of_the_package_imports_what_imports_it():
    """A part is a file or a folder right below the package; within a folder Python sees to it."""
    parts: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        inside = [name.split(".")[1] for name in imported(path, at_runtime=True) if name.startswith("mezo_lightning.")]
        parts.setdefault(part, set()).update(name for name in inside if name != part and name in PARTS)
    del parts["__init__"]  # the public names, which anyone may import and which import anyone
    assert list(graphlib.TopologicalSorter(parts).static_order())


def test_rewards_import_nothing_of_ours():
    files = sorted((ROOT / "rewards").rglob("*.py"))
    assert files
    for path in files:
        assert not [name for name in imported(path) if name.split(".")[0] == "mezo_lightning"], path


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno + 1 <= 80, node.name
