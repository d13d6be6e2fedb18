"""Who may import whom: arrows point downwards only, and importing fishkern stays light."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fishkern

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fishkern"

# From the top to the bottom; a module or package may import those of lower layers, and those of its
# own layer as long as there is no cycle. A new one gets its place here.
LAYERS = [
    {"__init__", "__main__"},
    {"integrations"},
    {"recipe", "ird", "delta"},
    {"differences"},
    {"scoring", "optim"},
    {"training"},
    {"batches", "selection"},
    {"interception"},
    {"functional"},
    {"_ops"},
    {"_dispatch"},
    {"backends"},
    {"names", "files", "tensors"},
]
# Inside a package, where there is an order; what is not named comes last.
INNER_LAYERS = {
    "scoring": [
        {"estimate", "baselines"},
        {"ranks"},
        {"rescoring"},
        {"passes"},
        {"accumulator", "candidates", "verification"},
        {"one_sample", "squares"},
    ],
    "selection": [{"select"}, {"masks"}],
    "training": [
        {"train_only"},
        {"owners", "report", "steps", "watch"},
        {"alias", "layers"},
        {"inputs"},
        {"makers"},
    ],
    "optim": [
        {"optimizer"},
        {"numerics", "remasking"},
        {"calls", "checkpoint"},
        {"arguments", "plans", "scaler", "wrapping"},
    ],
    "interception": [
        {"find_reruns"},
        {"rerun"},
        {"elementwise", "conv"},
        {"linear", "put_in"},
        {"capture", "embedding", "norm", "selected"},
        {"rules"},
    ],
}
# Of benchmarks/, from the top to the bottom.
BENCHMARKS = [
    {"run", "gpu", "plot", "studies"},
    {"cases"},
    {"contenders"},
    {"workloads"},
    {"memory"},
    {"harness", "machine"},
]
# The two consumers of interception do not know each other.
STRANGERS = [({"scoring"}, {"training", "optim"})]
HEAVY = {"triton", "transformers", "peft", "accelerate", "datasets", "matplotlib"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module):
    path = ROOT.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def imports(path, nodes=ast.walk):
    """The modules that a file imports, at its top or inside functions, but not for types only."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path.parent / "x")
    package = package.removesuffix(".x")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, [above, node.module]))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if base.startswith("fishkern") and exists(inner) else base


def unit(module):
    """The part of a module's name that has a layer."""
    return module.split(".")[1] if "." in module else "__init__"


def layer(name):
    for number, names in enumerate(LAYERS):
        if name in names:
            return number
    raise AssertionError(f"fishkern/{name} has no place in LAYERS of {Path(__file__).name}")


FILES = sorted(PACKAGE.rglob("*.py"))
ARROWS = {
    (module_name(path), target)
    for path in FILES
    for target in imports(path)
    if target.split(".")[0] == "fishkern"
}


def inner_layer(module):
    """The place of a module in its package."""
    _, package, name = module.split(".")[:3]
    order = INNER_LAYERS[package]
    return next((i for i, names in enumerate(order) if name in names), len(order))


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_every_module_has_a_layer(path):
    layer(unit(module_name(path)))


def test_arrows_point_down():
    wrong = [
        f"{source} imports {target}"
        for source, target in sorted(ARROWS)
        if layer(unit(target)) < layer(unit(source))
    ]
    assert wrong == []


def test_arrows_point_down_inside_packages():
    wrong = [
        f"{source} imports {target}"
        for source, target in sorted(ARROWS)
        if unit(source) == unit(target) in INNER_LAYERS
        and min(source.count("."), target.count(".")) > 1
        and inner_layer(target) < inner_layer(source)
    ]
    assert wrong == []


def test_every_place_is_taken():
    """What has a layer exists."""
    inner = {
        f"{package}.{n}" for package, order in INNER_LAYERS.items() for n in set().union(*order)
    }
    names = (set().union(*LAYERS) - {"__init__"}) | inner
    assert [name for name in sorted(names) if not exists(f"fishkern.{name}")] == []


def test_no_cycles():
    graph = {}
    for source, target in ARROWS:
        # a package's __init__ gathers its modules: it is not part of a cycle with them
        if not (target + ".").startswith(source + ".") and not source.startswith(target + "."):
            graph.setdefault(source, set()).add(target)
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_strangers():
    for one, other in STRANGERS:
        pairs = {(unit(source), unit(target)) for source, target in ARROWS}
        assert [p for p in pairs if (p[0] in one and p[1] in other)] == []
        assert [p for p in pairs if (p[0] in other and p[1] in one)] == []


def test_backends_know_only_themselves():
    wrong = [
        f"{source} imports {target}"
        for source, target in sorted(ARROWS)
        if source.startswith("fishkern.backends.")
        and target not in ("fishkern.backends.packed", "fishkern.backends.moments")
        and source.split(".")[:3] != target.split(".")[:3]
    ]
    assert wrong == []


def test_heavy_packages_stay_in_their_corner():
    corner = {"triton": "fishkern.backends.triton"}
    wrong = []
    for path in FILES:
        top_level = imports(path, nodes=ast.iter_child_nodes)
        for name in HEAVY & {target.split(".")[0] for target in top_level}:
            if not module_name(path).startswith(corner.get(name, "fishkern.integrations")):
                wrong.append(f"{module_name(path)} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_outsiders_use_public_names(folder):
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for target in imports(path):
            parts = target.split(".")
            if parts[0] == "fishkern" and (
                "backends" in parts or any(part.startswith("_") for part in parts)
            ):
                wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert wrong == []


def test_benchmarks_point_down_and_know_no_tests():
    places = {name: number for number, names in enumerate(BENCHMARKS) for name in names}
    wrong = []
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        source = module_name(path)
        for target in imports(path, nodes=ast.iter_child_nodes):
            up = target.startswith("benchmarks.") and places[unit(target)] < places[unit(source)]
            if up or target.startswith("tests"):
                wrong.append(f"{source} imports {target}")
    assert wrong == []


def test_public_names_are_documented():
    assert sorted(set(fishkern.__all__)) == sorted(fishkern.__all__)
    for name in fishkern.__all__:
        assert getattr(fishkern, name).__doc__, name


def test_import_is_light(tmp_path):
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fishkern\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
        "print(torch.cuda.is_initialized())\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(ROOT), FISHKERN_CACHE=str(tmp_path / "cache"))
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    loaded, initialized = run.stdout.splitlines()
    assert HEAVY & set(ast.literal_eval(loaded)) == set()
    assert initialized == "False"
    assert not (tmp_path / "cache").exists()  # nothing is compiled either
