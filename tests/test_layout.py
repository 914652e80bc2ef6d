"""Where files are, and that imports point one way: scripts -> probes, diagnostics -> data, vit ->
leaves of lib."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
METHODS = sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))
SCRIPTS = [*METHODS, "evaluate", "analysis"]
SHARED_PROBES = {                             # what several probes use; no probes
    "annotation_files", "annotations", "common", "figures", "heads", "label_crops", "label_maps",
    "own_data", "patches", "training"}


def modules():
    """{module: path} of all product code."""
    found = {file.stem: file for file in ROOT.glob("*.py")}
    for folder in ("lib", "probes", "diagnostics", "benchmarks"):
        found |= {f"{folder}.{file.stem}": file for file in (ROOT / folder).glob("*.py")
                  if file.stem != "__init__"}
    return found


def imports(path):
    """Modules of this repository that a file imports, also inside functions."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & known.keys()


GRAPH = {name: imports(path) for name, path in modules().items()}


def room(module):
    return module.split(".")[0] if "." in module else "top"


def test_at_the_top_are_the_scripts_the_vit_and_the_data():
    top = {name for name in GRAPH if room(name) == "top"}
    assert top == {*SCRIPTS, "vit", "data"}


def test_imports_have_no_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path, module])
        if module in done:
            return
        path.append(module)
        for other in GRAPH[module]:
            visit(other)
        done.add(path.pop())

    for module in GRAPH:
        visit(module)


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_point_down(module):
    allowed = dict(
        lib={"lib", "vit", "data"}, probes={"lib", "vit", "data", "probes"},
        diagnostics={"lib", "vit", "data", "diagnostics", "probes"},
        top={"lib", "vit", "data", "probes", "diagnostics"},
        benchmarks={*SCRIPTS, "lib", "vit", "data", "probes", "diagnostics", "benchmarks"})[
            room(module)]
    if module in ("vit", "data", *METHODS):
        allowed -= {"probes", "diagnostics"}
    if module in ("vit", "data"):
        allowed -= {"vit", "data"}
    for other in GRAPH[module]:
        assert (other if room(other) == "top" else room(other)) in allowed, f"{module} -> {other}"


@pytest.mark.parametrize("module", sorted(name for name in GRAPH if room(name) == "probes"))
def test_no_probe_borrows_from_another(module):
    others = {name.removeprefix("probes.") for name in GRAPH[module] if room(name) == "probes"}
    assert others <= SHARED_PROBES


def test_diagnostics_use_of_the_probes_only_what_is_no_probe():
    for module in GRAPH:
        if room(module) == "diagnostics":
            used = {name for name in GRAPH[module] if room(name) == "probes"}
            assert used <= {"probes.common", "probes.annotations", "probes.label_maps",
                            "probes.patches"}, module


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_from_any_folder(script, tmp_path):
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "--data" in done.stdout, done.stderr
