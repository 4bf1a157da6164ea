"""Three floors: nodes/ stands on host/, host/ on helios_core/, and nothing looks up. Read from the imports."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("helios_core", "host", "nodes")
LONGEST = 400  # lines of a file
# ComfyUI's own top-level modules, by which its parts are imported.
COMFYUI = {
    *("comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras", "app", "execution", "folder_paths"),
    *("latent_preview", "node_helpers", "server", "utils"),
}


def files(*floors: str) -> list[Path]:
    return [file for floor in floors for file in sorted((ROOT / floor).rglob("*.py"))]


def imported(file: Path) -> Iterator[str]:
    """Every name that a file imports, anywhere in it, in full: the pack's own as "pack.floor.file.name"."""
    package = ("pack", *file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            yield from (".".join([*start, *([node.module] if node.module else []), name.name]) for name in node.names)


def offending(floor: str, wrong) -> dict[str, set[str]]:
    """What the files of a floor import and should not, by the file."""
    found = {str(file.relative_to(ROOT)): {name for name in imported(file) if wrong(name)} for file in files(floor)}
    return {file: names for file, names in found.items() if names}


def of_comfyui(name: str) -> bool:
    return name.partition(".")[0] in COMFYUI


def within(name: str, *floors: str) -> bool:
    return any(f"{name}.".startswith(f"pack.{floor}.") for floor in floors)


def test_the_core_knows_neither_comfyui_nor_the_floors_above():
    assert not offending("helios_core", lambda name: of_comfyui(name) or within(name, "host", "nodes"))


def test_the_host_floor_knows_no_node():
    assert not offending("host", lambda name: within(name, "nodes"))


def test_nodes_know_comfyui_by_its_node_api_only():
    assert not offending("nodes", lambda name: of_comfyui(name) and not name.startswith("comfy_api.latest."))
    assert not [name for name in imported(ROOT / "__init__.py") if of_comfyui(name)]


def test_a_node_knows_no_other_node():
    found = offending("nodes", lambda name: within(name, "nodes") and not within(name, "nodes.inputs"))
    assert found.keys() == {"nodes/__init__.py"}


def probes(file: Path) -> list[str]:
    """Where a file asks what ComfyUI has: getattr and hasattr of its modules, by a name of the file's own."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    theirs = {
        (name.asname or name.name).partition(".")[0]
        for node in imports
        for name in node.names
        if of_comfyui(name.name) or (isinstance(node, ast.ImportFrom) and not node.level and of_comfyui(node.module))
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) > 1]
    return [
        ast.unparse(call)
        for call in calls
        if ast.unparse(call.func) in ("getattr", "hasattr")
        and isinstance(call.args[1], ast.Constant)
        and ast.unparse(call.args[0]).partition(".")[0] in theirs
    ]


def test_one_file_asks_what_this_version_of_comfyui_has():
    found = {str(file.relative_to(ROOT)): asked for file in files("host", "nodes") if (asked := probes(file))}
    assert found.keys() == {"host/compat.py"}
    switches = ("disable_dynamic", "is_dynamic", "search_aliases")
    asking = re.compile(rf'"({"|".join(switches)})"')
    named = [str(file.relative_to(ROOT)) for file in files("host", "nodes") if asking.search(file.read_text("utf-8"))]
    assert named == ["host/compat.py"]


@pytest.mark.parametrize("floor", FLOORS)
def test_the_pack_is_imported_relatively(floor):
    assert not offending(floor, lambda name: name.partition(".")[0] in FLOORS)


def unused(file: Path) -> list[str]:
    """Modules that a file imports by a name with a dot in it, and does not name again."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    imports = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names if not alias.asname]
    named = [f"{ast.unparse(node)}." for node in nodes if isinstance(node, ast.Attribute)]
    dotted = [alias.name for alias in imports if "." in alias.name]
    return [name for name in dotted if not any(use.startswith(f"{name}.") for use in named)]


@pytest.mark.parametrize("floor", FLOORS)
def test_what_is_imported_is_used(floor):
    """ruff passes these over: `import comfy.a` gives it the name `comfy`, and `comfy.b` uses that."""
    assert {str(file.relative_to(ROOT)): names for file in files(floor) if (names := unused(file))} == {}


@pytest.mark.parametrize("floor", FLOORS)
def test_no_file_is_too_long_to_be_understood(floor):
    lengths = {file.relative_to(ROOT): len(file.read_text(encoding="utf-8").splitlines()) for file in files(floor)}
    assert lengths
    assert {file: lines for file, lines in lengths.items() if lines > LONGEST} == {}
