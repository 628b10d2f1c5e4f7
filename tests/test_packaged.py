"""Configs that come with the library are found by name: in a clone, and where a wheel puts them."""

import re
from pathlib import Path

import pytest

from evmamba_jax import packaged
from evmamba_jax.errors import UserError
from evmamba_jax.training import parse_command

CONFIGS = Path(__file__).parents[1] / "configs"


def test_a_config_needs_no_other():
    """An installed one is inside the package, where none of the others is called ``configs``."""
    importing = re.compile(r"^\s*(from|import) configs\b", re.MULTILINE)
    assert [path for path in CONFIGS.rglob("*.py") if importing.search(path.read_text())] == []


def test_all_files_of_configs_have_names():
    assert {"digits", "fashion_mnist"} < set(packaged.names())
    assert len(packaged.names()) == len(list(CONFIGS.rglob("*.py")))


def test_files_in_folders_are_named_last():
    folders = ["/" in name for name in packaged.names()]
    assert folders == sorted(folders)
    assert {"segmentation/upernet_vmamba_t", "detection/retinanet_evmamba_t"} < set(packaged.names())


@pytest.mark.parametrize("name", ["digits", "evmamba_t", "evmamba_t:paper", "segmentation/upernet_vmamba_t"])
def test_a_name_stands_for_its_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stem, colon, variant = name.partition(":")
    by_name, workdir = parse_command(["x", "--config", name])
    by_file, same = parse_command(["x", f"--config={CONFIGS / stem}.py{colon}{variant}"])
    assert by_name == by_file
    assert workdir == same == Path("runs") / name.rpartition("/")[2].replace(":", "_")


def test_in_a_wheel_they_lie_inside_the_package(tmp_path, monkeypatch):
    inside = tmp_path / "evmamba_jax" / "configs" / "more"
    inside.mkdir(parents=True)
    (inside / "mine.py").touch()
    monkeypatch.setattr(packaged, "__file__", str(tmp_path / "evmamba_jax" / "packaged.py"))
    assert packaged.names() == ["more/mine"]
    assert packaged.find("more/mine:half") == f"{inside / 'mine.py'}:half"


def test_files_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits.py").touch()
    Path("own.py").touch()
    assert packaged.find("digits.py:half") == "digits.py:half"
    assert packaged.find("own") == "own.py"
    assert packaged.find("digits") != "digits.py"  # the packaged one


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("digit", "no packaged config is called so, did you mean 'digits'?; allowed: digits, digits_detection, "),
        ("evmamba_x:paper", "did you mean 'evmamba_"),
        ("configs/digitss.py", "there is no file configs/digitss.py, did you mean 'digits'?"),
        ("", "no packaged config is called so; allowed: digits"),
    ],
)
def test_what_is_not_there_is_told_with_the_nearest(config, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in ([f"--config={config}"], ["--config", config]):
        with pytest.raises(UserError) as caught:
            parse_command(["x", *argv])
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
