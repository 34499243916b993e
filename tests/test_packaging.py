"""What is shipped: the wheel holds all packages and configs, runs from any folder, and names no machine."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]


def tracked(*patterns: str) -> list[Path]:
    """Files of the checkout that git knows or would add; all below the source folders where there is no git."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listing = subprocess.run(command, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.splitlines() if (path := ROOT / name).is_file()]


def test_packages_are_the_folders():
    """A new package that is missing from the list would work in the checkout and be missing from the wheel."""
    folders = {path.parent.relative_to(ROOT) for path in tracked("fff/**.py", "experiments/**.py", "conf/**.py")}
    names = {".".join(folder.parts) for folder in folders}
    shipped = {name if name.split(".")[0] == "fff" else f"fff.{name}" for name in names}
    assert sorted(PACKAGES) == sorted(shipped)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, because setuptools leaves build/ and *.egg-info in the folder that it builds.
    source = folder / "source"
    for path in tracked():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_source_and_config(wheel):
    expected = {
        str(path.relative_to(ROOT)) if path.relative_to(ROOT).parts[0] == "fff" else f"fff/{path.relative_to(ROOT)}"
        for path in tracked("fff", "experiments/**.py", "conf")
    }
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert shipped == expected
        archive.extractall(wheel.parent / "site")


@pytest.mark.parametrize("command", ["train", "bench"])
def test_commands_run_from_the_wheel_in_another_folder(wheel, tmp_path, command):
    site = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    module, function = PROJECT["project"]["scripts"][f"fff-{command}"].split(":")
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from {module} import {function} as main; main()"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code, "--cfg", "job"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "seed:" in result.stdout or "suite" in result.stdout


def test_scripts_name_functions_that_exist():
    for target in PROJECT["project"]["scripts"].values():
        module, function = target.removeprefix("fff.").split(":")
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
        assert re.search(rf"^def {function}\(", source, re.MULTILINE), target


def test_lock_pins_every_dependency():
    pins = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name] = version
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {re.split(r"[\[<>=;]", entry)[0].strip() for entry in wanted} - {project["name"]}
    assert names <= set(pins)
    assert not any("+" in version for version in pins.values()), "a local version is on no registry"


def test_demo_draws_everything_into_a_folder_that_git_ignores():
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    commands = re.findall(r"-m experiments\.(\w+)(.*)", shown)
    assert [name for name, _ in commands] == ["train", "regions", "tables"]
    for _, arguments in commands[1:]:
        (folder,) = re.findall(r"--results-dir (\S+)", arguments)
        assert subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", f"{folder}/runs/demo.csv"]).returncode == 0


def test_no_file_names_a_machine():
    machine = re.compile(r"(?<![\w.])/(home|root|work|tmp|opt|mnt|Users)/\w|\bfile://(?!\.)/|index-url|find-links")
    for path in tracked():
        if path == Path(__file__) or path.suffix in {".png", ".svg", ".safetensors"}:
            continue
        hit = machine.search(path.read_text(errors="replace"))
        assert hit is None, f"{path.relative_to(ROOT)}: {hit.group()!r}"
