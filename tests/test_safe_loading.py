"""What the libraries load is loaded in one place, where nothing from a download can run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "pimerge"
ROOM = ROOT / "core/hf_loading.py"
METHODS = frozenset(
    """from_pretrained from_config load_dataset load_dataset_builder load_from_disk snapshot_download hf_hub_download
    cached_file get_class_from_dynamic_module get_kernel load_adapter_from_hub load_peft_weights register_for_auto_class
    import_module run_path run_module""".split()  # noqa: SIM905
)
BUILTINS = frozenset({"exec", "eval", "compile", "__import__"})
MODULES = frozenset("pickle cPickle dill cloudpickle joblib shelve marshal runpy".split())  # noqa: SIM905
ALLOWED = {
    "checkpoints/pickles.py": {"torch.load", "pickle"},  # pimerge convert, with weights_only=True
    "core/confined.py": {"pickle", "import_module"},  # what pimerge sends to its own process
    "core/plugins.py": {"import_module"},  # pimerge's own strategies
    "__init__.py": {"import_module"},
    "tasks/metric.py": {"import_module"},  # libraries that pimerge's own metrics name
}


def loading(tree: ast.AST) -> set[str]:
    """The calls and imports in a module that can load from a folder of somebody else."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names} & MODULES
        if isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").partition(".")[0]} & MODULES
            found |= {alias.name for alias in node.names} & METHODS
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            found |= {node.attr} & METHODS
            if (owner, node.attr) in {("torch", "load"), ("numpy", "load"), ("np", "load"), ("yaml", "load")}:
                found.add(f"{owner}.{node.attr}")
            if node.attr == "register" and owner.startswith("Auto"):
                found.add("register")
        if isinstance(node, ast.Name) and node.id in METHODS | BUILTINS:
            found.add(node.id)
    return found


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_only_one_module_loads(file: Path) -> None:
    found = loading(ast.parse(file.read_text(encoding="utf-8")))
    name = file.relative_to(ROOT).as_posix()
    assert file == ROOM or found <= ALLOWED.get(name, set()), "load with pimerge.core.hf_loading"


def test_every_loader_of_transformers_is_told_to_run_no_code() -> None:
    calls = [node for node in ast.walk(ast.parse(ROOM.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    called = [call for call in calls if getattr(call.func, "attr", "") in {"from_pretrained", "from_config"}]
    assert called
    for call in called:
        assert isinstance(call.func, ast.Attribute)
        owner = getattr(call.func.value, "id", "")
        options = {option.arg: getattr(option.value, "value", None) for option in call.keywords}
        assert owner.startswith("Peft") or options.get("trust_remote_code") is False


@pytest.mark.parametrize(
    "source",
    [
        "AutoConfig.from_pretrained('x')",
        "load = AutoModel.from_pretrained",
        "from datasets import load_dataset",
        "torch.load('x')",
        "import pickle",
        "AutoConfig.register('a', A)",
    ],
)
def test_other_loaders_are_found(source: str) -> None:
    assert loading(ast.parse(source))
