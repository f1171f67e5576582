"""The architecture, checked on the source text: layers, rooms, sizes, packaging, calls that are forbidden."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PACKAGES = ("avcil_dist", "data_shards", "launch")
# A module imports only from its own layer or from those above it in this table.
# compose stands below the methods because it validates a method's own options.
LAYERS = (
    (
        "avcil_dist",
        "avcil_dist.errors",
        "avcil_dist.exit_codes",
        "avcil_dist.seeds",
        "avcil_dist.system.",
        "avcil_dist.text.",
        "avcil_dist.world",
    ),
    ("avcil_dist.storage.",),
    ("avcil_dist.config.", "avcil_dist.scenario"),
    ("avcil_dist.data.",),
    ("avcil_dist.models.",),
    ("avcil_dist.methods.",),
    ("avcil_dist.compose",),
    ("avcil_dist.streams.",),
    ("avcil_dist.training.",),
    ("avcil_dist.inference.",),
    ("avcil_dist.tracking.",),
    ("avcil_dist.reporting.",),
    ("data_shards.",),
    ("launch.", "avcil_dist.__main__"),  # the command: it starts, and nothing imports it
)
# A room is a package of the second level with all below it, or a module beside these packages.
MAX_ROOMS = 22  # packages and modules of the library, data_shards, launch
FORBIDDEN = {  # neither imported nor needed by way of others
    "avcil_dist.streams": (
        "deepspeed",
        "torch.distributed",
        "mlflow",
        "avcil_dist.models.network",
        "avcil_dist.methods",
    ),
    "avcil_dist.reporting": ("avcil_dist.tracking", "avcil_dist.training", "mlflow"),
}
NOT_FOR_METHODS = ("avcil_dist.storage", "deepspeed", "mlflow", "torch.distributed", "fsspec", "launch")
PICKLERS = ("pickle", "dill", "cloudpickle", "shelve", "joblib")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def source_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (PROJECT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in source_files(*PACKAGES)}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports(name: str) -> Iterator[str]:
    """Every module that `name` imports, at its head or in a function; of `from x import y`, also `x.y`."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            yield from (node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names))


def own_imports(name: str) -> set[str]:
    """The project's modules that `name` needs; a package counts only where it is named itself."""
    found = {module for module in imports(name) if module in MODULES}
    of_packages = {module for module in found if any(other.startswith(f"{module}.") for other in found)}
    return found - of_packages - {name}


def layer_of(name: str) -> int:
    for number, members in enumerate(LAYERS):
        if any(name == member or (member.endswith(".") and f"{name}.".startswith(member)) for member in members):
            return number
    raise AssertionError(f"{name} is in no layer of the table")


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_its_own_layer_or_from_above(name: str) -> None:
    downward = [other for other in own_imports(name) if layer_of(other) > layer_of(name)]
    assert not downward, f"{name} imports {', '.join(downward)} of a later layer"


def test_no_module_imports_itself_by_way_of_others() -> None:
    finished: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " imports ".join((*way[way.index(name) :], name))
        if name not in finished:
            for other in sorted(own_imports(name)):
                visit(other, (*way, name))
            finished.add(name)

    for name in MODULES:
        visit(name, ())


def room_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if ".".join(parts[:2]) in MODULES else parts[0]


def test_no_circle_between_rooms() -> None:
    needs: dict[str, set[str]] = {}
    for name in MODULES:
        needs.setdefault(room_of(name), set()).update(room_of(other) for other in own_imports(name))
    order: list[str] = []
    while rest := {room: others - {room, *order} for room, others in needs.items() if room not in order}:
        free = sorted(room for room, others in rest.items() if not others)
        assert free, f"rooms that import each other are among {rest}"
        order += free


def test_rooms_are_few() -> None:
    rooms = {".".join(name.split(".")[: 2 if within(name, ("avcil_dist",)) else 1]) for name in MODULES} - {
        "avcil_dist"
    }
    assert len(rooms) <= MAX_ROOMS, sorted(rooms)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_room_needs_nothing_that_it_must_work_without(package: str) -> None:
    names = needed_by([name for name in MODULES if within(name, (package,))])
    breaches = {name: [other for other in imports(name) if within(other, FORBIDDEN[package])] for name in names}
    assert not {name: others for name, others in breaches.items() if others}


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, ("avcil_dist.tracking",))])
def test_tracking_imports_nothing_of_training(name: str) -> None:
    assert not [other for other in imports(name) if within(other, ("avcil_dist.training", "avcil_dist.reporting"))]


def needed_by(names: list[str]) -> set[str]:
    """The modules, all that they import, and all that these import."""
    needed, waiting = set(names), list(names)
    assert needed
    while waiting:
        new = own_imports(waiting.pop()) - needed
        needed |= new
        waiting += new
    return needed


LIBRARY = [name for name in MODULES if within(name, ("avcil_dist",)) and name != "avcil_dist.__main__"]


def test_nothing_imports_the_entry_of_the_command() -> None:
    assert not [name for name in MODULES if "avcil_dist.__main__" in imports(name)]


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_imports_neither_what_makes_shards_nor_what_starts_it(name: str) -> None:
    assert not [other for other in imports(name) if within(other, ("data_shards", "launch", "tests"))]


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, ("avcil_dist.methods",))])
def test_methods_import_neither_storage_nor_process_groups(name: str) -> None:
    assert not [other for other in imports(name) if within(other, NOT_FOR_METHODS)]


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, ("avcil_dist",))])
def test_the_library_needs_no_command_line_and_prints_nothing(name: str) -> None:
    assert not [other for other in imports(name) if within(other, ("click",))]
    assert not [line for function, _, line in calls(TREES[name]) if function == "print"]


def test_the_tags_of_mlflow_runs_are_named_in_one_module() -> None:
    literals = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"avcil\.\w+", node.value)
    }
    assert literals == {"avcil_dist.tracking.tags"}


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in source_files(*PACKAGES, "tests")}
    assert not {str(path): length for path, length in lengths.items() if length > MAX_FILE_LINES}


def test_functions_are_short() -> None:
    long = [
        f"{name}.{node.name}: {length} lines"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long


def test_every_package_and_only_the_three_are_packaged() -> None:
    setup = ast.parse((PROJECT / "setup.py").read_text())
    call = next(node for node in ast.walk(setup) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup")
    packages = ast.literal_eval(next(keyword.value for keyword in call.keywords if keyword.arg == "packages"))
    folders = {".".join(path.parent.relative_to(PROJECT).parts) for path in MODULES.values()}
    assert set(packages) == folders | {"avcil_dist.configs"}
    assert {package.split(".")[0] for package in packages} == set(PACKAGES)


def test_nothing_else_at_the_top_is_importable() -> None:
    importable = {path.parent.name for path in PROJECT.glob("*/__init__.py")}
    assert importable - {"tests"} == set(PACKAGES)


def test_the_folder_of_configurations_holds_data_only() -> None:
    assert {path.suffix for path in (PROJECT / "configs").rglob("*") if path.is_file()} == {".yaml"}


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, str], int]]:
    """Each call: what is called, its keyword arguments, its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg or "**": ast.unparse(keyword.value) for keyword in node.keywords}
            yield ast.unparse(node.func), keywords, node.lineno


# data_shards.listings.pickled_dict reads the published pickled lists and admits harmless names only (test_splits).
@pytest.mark.parametrize("name", [name for name in MODULES if name != "data_shards.listings.pickled_dict"])
def test_nothing_read_is_ever_unpickled(name: str) -> None:
    found = {module for module in imports(name) if within(module, PICKLERS)}
    if "pickle.UnpicklingError" in found:  # the error that torch.load refuses a file with
        found -= {"pickle", "pickle.UnpicklingError"}
    assert not found
    for function, keywords, line in calls(TREES[name]):
        where = f"{name}:{line}: {function}"
        assert keywords.get("allow_pickle", "False") == "False", where
        if function == "torch.load":
            assert keywords.get("weights_only") == "True", where
        if function in ("np.load", "numpy.load"):
            assert "allow_pickle" in keywords, where
        assert not function.startswith("pickle."), where
        assert function not in ("yaml.load", "yaml.unsafe_load", "eval", "exec"), where


@pytest.mark.parametrize("name", MODULES)
def test_no_collective_exchanges_pickles(name: str) -> None:
    """torch's collectives of objects unpickle what another rank, or a stranger, has sent."""
    words = (
        node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in ast.walk(TREES[name])
    )
    assert not [word for word in words if re.search(r"(broadcast|gather|scatter|send|recv)_object", word)]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: which files are the project's is not known")
    return [path for name in listed.stdout.split("\0") if name and (path := PROJECT / name).is_file()]


@pytest.mark.slow
def test_no_text_holds_a_path_of_one_machine() -> None:
    private = re.compile(r"(?:(?<![\w.$}~/-])|(?<=file://))/(?:work|tmp|home|root|Users)\b")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if private.search(line):
                found.append(f"{path.relative_to(PROJECT)}:{number}: {line.strip()[:100]}")
    assert not found
