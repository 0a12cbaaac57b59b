"""The wheel, its metadata and its dependencies; the installation by `make`."""

import ast
import configparser
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import keras_lipattn as kl
from keras_lipattn import _requirements as _requirements_check

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
FOLDERS = ("keras_lipattn", "examples", "tools", "tests", "tests_backends")
SOURCES = ("keras_lipattn", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def _requirements(text):
    lines = (line.strip() for line in text.splitlines())
    names = (re.match(r"[\w.-]+", line) for line in lines if not line.startswith("#"))
    return {match.group().lower().replace("_", "-") for match in names if match}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # From a copy, since building leaves files among the sources.
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--quiet", "-w", folder, source], check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    files = [*(ROOT / "keras_lipattn").rglob("*.py"), ROOT / "keras_lipattn" / "py.typed"]
    sources = {str(path.relative_to(ROOT)) for path in files}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == sources


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = archive.read(name).decode()
    for line in (
        "Name: keras-lipattn",
        f"Version: {kl.__version__}",
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.11",
        "Provides-Extra: examples",
        "Provides-Extra: jax",
        "Provides-Extra: torch",
        "Provides-Extra: dev",
    ):
        assert line in metadata.splitlines()


def test_changelog_and_citation_are_about_this_version():
    (newest, *_) = re.findall(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = (ROOT / "CITATION.cff").read_text()
    cited = re.findall(r"^(?:version|date-released): (\S+)$", citation, re.M)
    assert newest[0] == cited[0] == kl.__version__
    assert newest[1] in (cited[1], "unreleased")


def test_the_wheel_works_in_an_environment_of_its_own(wheel, tmp_path):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    # Its dependencies are those that are installed here. Files such as the one of an editable
    # installation have no effect there.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
    subprocess.run([*install, "--no-index", "--quiet", wheel], check=True)
    shutil.copy(ROOT / "tests" / "helpers" / "installed_package.py", tmp_path / "test_smoke.py")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_smoke.py"],
        cwd=tmp_path,
        env={**clean, "KERAS_LIPATTN_SITE": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _imports(path, *, at_import_time):
    """Top-level names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if at_import_time else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def _imported(*folders, at_import_time=False):
    """Distributions that files of the repository import, other than their own modules."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    names = {name for path in files for name in _imports(path, at_import_time=at_import_time)}
    names -= {path.stem for folder in FOLDERS for path in (ROOT / folder).rglob("*")}
    names -= {*FOLDERS, *sys.stdlib_module_names}
    return {_DISTRIBUTIONS.get(name, name).replace("_", "-") for name in names}


_DISTRIBUTIONS = {
    "absl": "absl-py",
    "google": "protobuf",
    "grpc": "grpcio",
    "sklearn": "scikit-learn",
    "tensorflow_serving": "tensorflow-serving-api",
}
_REQUIRED = _requirements(SETUP["options"]["install_requires"])
_EXTRAS = {name: _requirements(lines) for name, lines in SETUP["options.extras_require"].items()}
# Tests and examples that use them are skipped without them.
_OPTIONAL = {"keras-hub", *_EXTRAS["runtimes"]}
# Commands, plugins, and modules that other packages import.
_NOT_IMPORTED = {
    "codespell",
    "importlib-resources",
    "pyright",
    "pytest-xdist",
    "ruff",
    "setuptools",
    "tensorboard",
}


def test_what_the_package_imports_is_declared_and_what_is_declared_is_imported():
    at_import_time = _imported("keras_lipattn", at_import_time=True)
    assert at_import_time <= _REQUIRED
    anywhere = _imported("keras_lipattn")
    assert _REQUIRED <= anywhere
    optional = ("examples", "attacks", "jax", "torch")
    assert anywhere <= _REQUIRED.union(*(_EXTRAS[name] for name in optional))


def test_what_examples_tools_and_tests_import_is_declared():
    backends = _EXTRAS["jax"] | _EXTRAS["torch"]
    examples, others = _imported("examples"), _imported("tools", "tests", "tests_backends")
    assert examples <= _REQUIRED | _EXTRAS["examples"] | _OPTIONAL
    assert others <= _REQUIRED | _EXTRAS["examples"] | _EXTRAS["dev"] | backends | _OPTIONAL
    declared = _EXTRAS["examples"] | _EXTRAS["dev"]
    assert declared - _NOT_IMPORTED <= examples | others
    assert _NOT_IMPORTED <= declared


def test_every_direct_requirement_has_a_tested_version():
    wanted = _requirements(SETUP["options"]["install_requires"])
    for extra in SETUP["options.extras_require"].values():
        wanted |= _requirements(extra)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")
    }
    assert wanted <= pinned
    assert all("==" in line for line in lines if not line.startswith("#"))


def _pins(name):
    """The pinned version of each requirement in a file, by normalized name."""
    lines = (ROOT / name).read_text().splitlines()
    pins = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines)
    return {pin[1].lower().replace("_", "-"): pin[2] for pin in pins if pin}


def test_requirements_with_hashes_are_those_that_make_installs():
    hashed, pinned = _pins("requirements-dev.txt"), _pins("constraints.txt")
    # Windows has one more, which nothing here is tested with.
    assert {name: pinned.get(name, hashed[name]) for name in hashed} == hashed
    direct = _requirements(SETUP["options"]["install_requires"])
    extras = _EXTRAS["examples"] | _EXTRAS["dev"] | _EXTRAS["runtimes"]
    assert direct | extras <= set(hashed)
    blocks = re.split(r"\n(?=\S)", (ROOT / "requirements-dev.txt").read_text())
    assert all("--hash=sha256:" in block for block in blocks if not block.startswith("#"))


def _lower_limits(text):
    return dict(re.findall(r"^([\w-]+)>=([\d.]+)$", text.strip(), re.MULTILINE))


def test_the_oldest_releases_allowed_are_checked_at_import_and_tested():
    limits = _lower_limits(SETUP["options"]["install_requires"])
    assert {name: limits[name] for name in _requirements_check._OLDEST} == (
        _requirements_check._OLDEST
    )
    (tested,) = re.findall(r"^OLDEST := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for pin in tested.split():
        name, version = pin.split("==")
        assert version.startswith(limits[name] + ".")


@pytest.mark.parametrize("found", [None, "1.12.9", "0.99"])
def test_a_requirement_that_is_missing_or_too_old_is_an_error_with_its_remedy(found):
    program = f"""
import importlib.metadata
version = importlib.metadata.version
def other(name):
    if name != "scipy":
        return version(name)
    if {found!r} is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return {found!r}
importlib.metadata.version = other
import keras_lipattn
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    received = f"scipy {found}" if found else "no scipy"
    message = f"needs scipy 1.13 or newer: run `pip install 'scipy>=1.13'`. Received: {received}"
    assert message in done.stderr


def test_backends_get_all_requirements_but_tensorflow():
    (needs,) = re.findall(r"^BACKEND_NEEDS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    wanted = _requirements(SETUP["options"]["install_requires"])
    assert set(needs.split()) == wanted - {"tensorflow"}


NAMESPACES = (
    "callbacks",
    "certification",
    "distribution",
    "evaluation",
    "layers",
    "losses",
    "metrics",
)


@pytest.mark.parametrize("namespace", [None, *NAMESPACES])
def test_everything_public_exists_and_is_documented(namespace):
    module = getattr(kl, namespace) if namespace else kl
    assert sorted(module.__all__) == list(module.__all__)
    for name in module.__all__:
        assert name == "__version__" or getattr(module, name).__doc__


def test_namespaces_are_public_and_the_readme_lists_them():
    assert set(NAMESPACES) < set(kl.__all__)
    table = re.findall(r"^\| `keras_lipattn\.(\w+)` \|", (ROOT / "README.md").read_text(), re.M)
    assert sorted(table) == sorted(NAMESPACES)


def test_ci_runs_what_the_readme_tells():
    commands = re.findall(r"^make \w+$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert commands == ["make lint", "make test"]
    for command in (*commands, "make demo"):
        assert command in (ROOT / "README.md").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def _python(folder, body):
    """A stand-in for Python, a shell script; `$real` is the true one."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nreal={sys.executable}\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def _make(checkout, *arguments):
    # Not the flags of a make that runs the tests, else this one would share its jobs.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=environment, capture_output=True, text=True
    )


# What a virtual environment is made of here: a folder whose python does `body`.
_FAKE_VENV = (
    'case "$*" in *venv*) mkdir -p .venv/bin; '
    "printf '#!/bin/sh\\n%s\\n' \"{body}\" > .venv/bin/python; chmod +x .venv/bin/python;; "
    '*) exec "$real" "$@";; esac'
)


def test_an_installation_that_fails_is_begun_again(checkout, tmp_path):
    failing = _python(tmp_path, _FAKE_VENV.format(body="echo broken >&2; exit 3"))
    for _ in range(2):
        done = _make(checkout, ".venv", f"PYTHON={failing}")
        assert done.returncode != 0
        assert "broken" in done.stderr
    working = _python(tmp_path, _FAKE_VENV.format(body="exit 0"))
    assert _make(checkout, ".venv", f"PYTHON={working}").returncode == 0


def test_an_installation_is_made_anew_when_requirements_change(checkout, tmp_path):
    python = _python(tmp_path, _FAKE_VENV.format(body="echo installing"))
    assert "installing" in _make(checkout, ".venv", f"PYTHON={python}").stdout
    assert "installing" not in _make(checkout, ".venv", f"PYTHON={python}").stdout
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        stamp = (checkout / ".venv" / "installed").stat().st_mtime
        os.utime(checkout / name, (stamp + 1, stamp + 1))
        assert "installing" in _make(checkout, ".venv", f"PYTHON={python}").stdout
        os.utime(checkout / name, (stamp - 1, stamp - 1))


@pytest.mark.parametrize("python", ["", "/no/such/python"])
def test_without_a_new_enough_python_the_error_says_so(python, checkout):
    done = _make(checkout, ".venv", f"PYTHON={python}")
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed. Received:" in done.stderr
    assert not (checkout / ".venv" / "installed").exists()
