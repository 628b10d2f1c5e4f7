"""``benchmarks/gpu_all.py``: a dry run of every row, and what becomes of rows that fail."""

import functools
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from evmamba_jax.analysis import peers
from evmamba_jax.measuring.document import Report
from pallas_kernels import Order, gpu

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gpu_all():
    """The script, as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import gpu_all

        yield gpu_all
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def tables(document):
    """Return the rows of each table by the heading above it."""
    found, heading = {}, ""
    for part in document["parts"]:
        heading = part.get("heading", heading)
        if "rows" in part:
            found[heading] = part["rows"]
    return found


def test_a_dry_run_tries_every_row(gpu_all, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_all.py", "--dry", "--out", str(tmp_path / "dry.json")])
    gpu_all.main()
    found = tables(json.loads((tmp_path / "dry.json").read_text()))
    assert [len(rows) for rows in found.values()] == [1, 7, 9, 4, 8, 10, 3]
    for heading, rows in found.items():
        for what, whose, *rest in rows:
            expected = "tried" if whose in ("ours", "loops in float64") else "not measured: "
            assert rest[0].startswith(expected), (heading, what, whose, rest)
    goals = {whose: goal for _, whose, *_, goal in found["Scans alone, N = 16"]}
    assert goals == {"ours": "", "mamba-ssm": "at least 1.9", "jax-linear-attention": "at least 1.0"}


def test_the_committed_table_has_every_row(gpu_all):
    """Measured or not: with what the script asks for now, in its order."""
    found = tables(json.loads((ROOT / "benchmarks/results/gpu_all.json").read_text()))
    listed = [(section, what, whose, rest[-1]) for section, rows in found.items() for what, whose, *rest in rows]
    assert listed == [(row.section, row.what, row.side, row.goal) for row in gpu_all.rows()]


SPOKEN = "print('noise'); print('{\"forward\": 2}')"


@pytest.mark.parametrize(
    ("code", "limit", "facts"),
    [
        (SPOKEN, 20, {"forward": 2}),
        ("import os, sys; print('gone', file=sys.stderr); os.kill(os.getpid(), 11)", 20, "failed with code -11: gone"),
        ("import time; time.sleep(60)", 0.5, "not done after 0 s"),
        ("", 20, "ended without an answer"),
        ("print('noise')", 20, "ended without an answer"),
    ],
)
def test_a_row_that_ends_badly_is_told(gpu_all, code, limit, facts):
    found = gpu_all.in_process([sys.executable, "-S", "-c", code], limit, dict(os.environ))
    assert found == (facts if isinstance(facts, dict) else {"failure": facts})


def test_an_interpreter_that_is_not_there(gpu_all, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_all.py", "--peer-python", "nowhere/python"])
    with pytest.raises(SystemExit):
        gpu_all.main()
    assert "--peer-python nowhere/python is no program" in capsys.readouterr().err


def test_what_a_row_started_ends_with_it(gpu_all, tmp_path):
    """The process of the peers, as here, would keep the GPU."""
    pipe = tmp_path / "open"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    code = (
        "import subprocess, sys, time; child = [sys.executable, '-S', '-c', 'import time; time.sleep(60)']; "
        f"subprocess.Popen(child, stdout=open({str(pipe)!r}, 'w')); time.sleep(60)"
    )
    gpu_all.in_process([sys.executable, "-c", code], 2, dict(os.environ))
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""  # nobody has it open any more
    os.close(reader)


FACTS = {
    "correctness": {"worst": 0.5, "of": "atrous, y"},
    "model": {"rate": 3000.0, "batch": 128, "quartiles": (2900.0, 3100.0), "memory": 5.0, "compile": 60.0},
    "official": {"rate": 1500.0, "batch": 128, "quartiles": (1400.0, 1600.0), "memory": 6.0},
    "scan": {"forward": 0.5, "backward": 2.0, "share forward": 0.6, "share backward": 0.4},
    "torch_scan": {"forward": 1.0, "backward": 5.0},
}


def run(gpu_all, measure, budget=1e9, refusal=""):
    report = Report("Test")
    gpu_all.measure_all(report, measure, budget, dry=False, refusal=refusal)
    return tables(report.document)


def test_ratios_are_ours_over_theirs(gpu_all):
    found = run(gpu_all, lambda row, limit: FACTS[row.call[0]])
    # Of models, images/s over theirs; of scans, their milliseconds over ours.
    theirs = found["Train steps"][5]
    assert theirs[:4] == ["evmamba_t", "EfficientVMamba", pytest.approx(1e3 * 128 / 1500, 1e-4), 1500.0]
    assert theirs[-2:] == [2.0, "at least 2"]
    assert found["Train steps of the other official codes"][0][-2:] == [2.0, ""]
    assert found["Scans alone, N = 16"][1] == [
        "EfficientVMamba-T stage 1", "mamba-ssm", 1.0, 2.0, 5.0, 2.5, "at least 1.9",
    ]  # fmt: skip
    assert found["Scans alone, N = 1"][0][2:6] == [0.5, 0.6, 2.0, 0.4]


def test_the_speed_of_wrong_kernels_is_not_printed(gpu_all):
    def measure(row, limit):
        return {"wrong": "cross: y differs"} if row.section == "Correctness" else FACTS[row.call[0]]

    found = run(gpu_all, measure)
    assert found["Correctness"][0][2] == "wrong: cross: y differs"
    rows = [row for section in found for row in found[section] if section != "Correctness"]
    assert {row[2] for row in rows if row[1] == "ours"} == {"not measured: the kernels are not known to be right"}
    assert all(isinstance(row[2], float) for row in rows if row[1] == "mamba-ssm")
    assert {row[3] for row in rows if row[1] == "mamba-ssm"} == {None}  # nothing to compare with


def test_the_budget_ends_the_run(gpu_all, monkeypatch):
    clock, limits = [0.0], []

    def measure(row, limit):
        limits.append(limit)
        clock[0] += 50
        return FACTS[row.call[0]]

    monkeypatch.setattr(gpu_all.time, "monotonic", lambda: clock[0])
    found = run(gpu_all, measure, budget=120)
    # Of the second 70 s are left, of the third 20; the fourth would begin too late.
    assert limits == [120, 70, 20]
    assert found["Train steps"][1][0] == "vmamba_t"
    assert isinstance(found["Train steps"][1][2], float)
    assert found["Train steps"][2][2] == "not measured: no time left"


def test_the_official_code_is_measured_in_its_environment(gpu_all, monkeypatch, tmp_path):
    asked = []

    class Peers:
        def __init__(self, python, models, **settings):
            asked.append((python, *models, settings["device"]))

        def load(self, model, **case):
            asked.append(case)
            return 2**31

        def measure(self, model, steps):
            return 0.064

        def close(self):
            asked.append("closed")

    monkeypatch.setattr(peers, "Peers", Peers)
    settings = gpu_all.Settings("theirs", str(tmp_path), dry=False)
    assert "there is no" in gpu_all.facts_of(("official", "vmamba_t", "training"), settings)["missing"]
    (tmp_path / "VMamba").mkdir()
    facts = gpu_all.facts_of(("official", "vmamba_t", "training"), settings)
    assert facts == {"batch": 128, "rate": 2000, "quartiles": (2000, 2000), "memory": 2}
    case = {"batch": 128, "size": 224, "dtype": "bfloat16", "mode": "training"}
    assert asked == [("theirs", f"official:{tmp_path}/VMamba:vmambav2v_tiny_224", "cuda"), case, "closed"]


def test_what_is_cached_names_no_path(gpu_all, tmp_path):
    """A kernel's code tells the places of its source lines, and is part of the key of an entry."""
    orders = (Order(),)
    like = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    shapes = (1, 2, 2, 32), (1, 32, 3), (1, 1, 32), (1, 32), (1, 32, 1), (1, 32)
    arguments = list(map(like, shapes))

    def lowered():
        forward, _ = gpu.SCAN2D.passes(orders=orders)
        with use_abstract_mesh(gpu_all.gpu_scans.described()):
            return jax.jit(forward).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    name = "jax_hlo_source_file_canonicalization_regex"
    value = gpu_all.environment(tmp_path)[name.upper()]
    assert "/pallas_kernels/" in lowered()
    jax.config.update(name, value)
    try:
        assert "/pallas_kernels/" not in lowered()
    finally:
        jax.config.update(name, None)
