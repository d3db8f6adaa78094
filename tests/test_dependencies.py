"""What the code imports is declared, and the oldest versions that are declared are those that are tested."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("callbacks", "lightning_modules", "datamodules")
SCRIPTS = tuple(sorted(file.name for file in REPOSITORY.glob("featherlight*.py")))


def our_files() -> list[Path]:
    """The sources that are installed."""
    return sorted(
        [file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py")]
        + [REPOSITORY / script for script in SCRIPTS]
    )


def requirements(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with these extras."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    return [*map(Requirement, project["dependencies"])] + [
        Requirement(line) for extra in extras for line in optional[extra]
    ]


def lower_bound(requirement: Requirement) -> str | None:
    return next((part.version for part in requirement.specifier if part.operator == ">="), None)


def imported(source: str) -> set[str]:
    """The first part of every absolute import, also of those inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def test_every_import_of_the_code_is_declared():
    ours = {*PACKAGES, *(script.removesuffix(".py") for script in SCRIPTS)}
    distributions = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in requirements("demo", "export", "llm")}
    for file in our_files():
        for name in imported(file.read_text(encoding="utf-8")) - set(sys.stdlib_module_names) - ours:
            candidates = {canonicalize_name(found) for found in distributions.get(name, [])}
            assert candidates & declared, (
                f"{file.relative_to(REPOSITORY)} imports {name} (of {sorted(candidates) or 'none'}), "
                "which pyproject.toml does not declare: it comes with another package today, and may not "
                "tomorrow."
            )


def test_imports_inside_functions_count():
    source = "import a.b\ndef f():\n    from c.d import e\n    from . import g\n"
    assert imported(source) == {"a", "c"}


def test_the_oldest_environment_has_the_lower_bounds():
    """`make test-oldest` runs with what pyproject.toml promises."""
    lines = (REPOSITORY / "tests" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    bounds = {
        requirement.name: lower_bound(requirement) for requirement in requirements("demo", "export", "llm")
    }
    assert {name: Version(version) for name, version in pins.items()} == {
        name: Version(version or "0") for name, version in bounds.items()
    }, "tests/oldest.txt and the lower bounds of pyproject.toml differ: change both, and run make test-oldest"


def test_the_extra_for_development_has_all_others():
    """Also with the same bounds; what is installed for the tests is what users get."""
    development = {requirement.name: str(requirement) for requirement in requirements("dev")}
    for requirement in requirements("llm"):
        assert development[requirement.name] == str(requirement)
    assert "featherlight" in development


@pytest.mark.parametrize("package", PACKAGES)
def test_type_hints_are_shipped(package):
    assert (REPOSITORY / package / "py.typed").is_file()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert "py.typed" in project["tool"]["setuptools"]["package-data"][package]


def test_the_makefile_keeps_environments_apart():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    ignored = (REPOSITORY / ".gitignore").read_text(encoding="utf-8").split()
    for environment in set(re.findall(r"\.venv[\w-]*", makefile)):
        assert f"{environment}/" in ignored
