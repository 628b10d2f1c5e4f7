"""What the README and the docs show is what there is."""

import re
from pathlib import Path

import pytest

from evmamba_jax import list_models
from evmamba_jax.models.__main__ import main
from evmamba_jax.models.registry import VARIANTS
from evmamba_jax.training import parse_command

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/scan_orders.md",
    "docs/models.md",
    "docs/own_data.md",
    "docs/training.md",
    "docs/segmentation.md",
    "docs/detection.md",
    "pallas_kernels/README.md",
]


def blocks(document):
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def test_the_first_block_is_two_self_sufficient_lines():
    kind, text = blocks("README.md")[0]
    train, test = text.splitlines()
    assert kind == "sh"
    for line in (train, test):
        assert line.startswith("python3 -m venv")
        assert "-m pip" in line
    assert train.endswith("train_tpu.py --config configs/digits.py")
    assert test.endswith("-m pytest")


def test_python_blocks_run():
    namespace: dict = {}
    for kind, text in blocks("README.md"):
        if kind == "python":
            exec(text, namespace)
    assert namespace["logits"].shape == (1, 1000)
    assert [stage.shape for stage in namespace["stages"]] == [
        (1, 56, 56, 48),
        (1, 28, 28, 96),
        (1, 14, 14, 192),
        (1, 7, 7, 384),
    ]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_modules_that_are_named_exist(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / document).parent / target).exists(), target
    for path in re.findall(r"\b(?:configs|evmamba_jax|tests|docs|benchmarks|pallas_kernels)/[\w./-]*\w", text):
        if "FAMILY" not in path and "NAME" not in path:
            assert (ROOT / path).exists(), path
    for _, block in blocks(document):
        for module in re.findall(r"-m (evmamba_jax[\w.]*)", block):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), module


def test_the_table_of_models_is_what_the_command_prints(capsys):
    """``python -m evmamba_jax.models --markdown`` writes it again."""
    assert main(["--markdown"]) == 0
    table = capsys.readouterr().out
    assert [line.split("`")[1] for line in table.splitlines()[2:]] == [
        name for name, variant in VARIANTS.items() if variant.card
    ]
    text = (ROOT / "README.md").read_text()
    assert f"\n\n{table}\n" in text
    assert f"{len(list_models())} in all" in text


def test_flags_that_are_shown_are_known():
    from evmamba_jax.training.command import _fields
    from evmamba_jax.training.config import Config

    known = dict(_fields(Config))
    for document in ["README.md", "docs/own_data.md", "docs/training.md", "CONTRIBUTING.md"]:
        for name in re.findall(r"--config\.([a-z_.]+)=", (ROOT / document).read_text()):
            assert name in known, f"{document}: {name}"


@pytest.mark.parametrize(("page", "config"), [("segmentation", "upernet"), ("detection", "retinanet")])
def test_settings_that_a_page_of_a_task_shows_are_taken(page, config):
    """In commands, and in tables below a head that says what stands before them."""
    prefix, given = "", []
    for line in (ROOT / "docs" / f"{page}.md").read_text().splitlines():
        given += re.findall(r"--config\.[a-z_.]+=[^ `]+", line)
        if head := re.match(r"\| `(--config\.[a-z.]*)` \|", line):
            prefix = head[1]
        elif not line.startswith("|"):
            prefix = ""
        elif prefix and not line.startswith("|---"):
            given += [prefix + setting for setting in re.findall(r"`([a-z_.]+=[^`]*)`", line.split("|")[1])]
    assert len(given) > 10
    parsed, _ = parse_command(["train", "--config", f"{page}/{config}_evmamba_t", *given])
    assert parsed.data.name in ("town", "birds")
