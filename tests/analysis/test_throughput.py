"""``analysis throughput``: its arithmetic, its rows, its peers; clocks and devices are made up."""

import ast
import json
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evmamba_jax.analysis import estimates, peer, peers, speed, speed_table, throughput
from evmamba_jax.analysis.speed import OutOfMemory, Program
from evmamba_jax.analysis.speed_plot import by_accuracy, by_size
from evmamba_jax.counting import count_parameters
from evmamba_jax.errors import UserError
from evmamba_jax.measuring import machine
from evmamba_jax.measuring.rounds import spread, steps_for, take_turns, waited
from evmamba_jax.models import abstract_model
from evmamba_jax.preflight.clock import UNCERTAINTY
from evmamba_jax.training import parse_command

SMALL = ("--size", "32", "--rounds", "3", "--seconds", "3")


class Clock:
    """Seconds that pass where a test says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(speed, "time", made)
    return made


@pytest.fixture
def programs(monkeypatch, clock):
    """Let a step of every program take what ``cost`` says of its case; return the cases that were compiled."""
    compiled = []

    def cost(batch, image_size, **_):
        return batch * (image_size / 32) ** 2 * 0.01

    def prepare(model, **case):
        compiled.append((model, *case.values()))

        def run():
            if case["image_size"] == 1024:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
            if case["image_size"] == 1023:
                raise jax.errors.JaxRuntimeError("UNAVAILABLE: the TPU went away")
            clock.now += cost(**case)
            return jnp.zeros(())

        return Program(run, batch=case["batch"], needed=3 * 2**20, compile_seconds=1.5, multiply_adds=2_000_000_000)

    monkeypatch.setattr(speed, "prepare", prepare)
    return compiled


def rows_of(path):
    (table,) = [part for part in json.loads(path.read_text())["parts"] if "columns" in part]
    names = [column["name"] for column in table["columns"]]
    return [{name: cell for name, cell in zip(names, row, strict=False) if cell is not None} for row in table["rows"]]


def told(capsys, *command):
    """Run a command that is wrong; return its one line."""
    capsys.readouterr()
    assert speed_table.main([*command]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(lines)
    return lines[-1]


# Arithmetic.


def test_quartiles_are_numpys():
    values = list(np.random.default_rng(0).standard_normal(11))
    for n in (2, 3, 4, 11):
        np.testing.assert_allclose(spread(values[:n]), np.percentile(values[:n], [50, 25, 75]), rtol=1e-12)
    assert spread([3.0]) == (3.0, 3.0, 3.0)


def test_a_time_is_divided_among_rounds():
    assert steps_for(6.0, 0.01, 10) == (10, 60)
    assert steps_for(6.0, 1.0, 10) == (6, 1)
    assert steps_for(6.0, 100.0, 10) == (3, 1)  # so long that the least number of rounds decides
    assert steps_for(6.0, 1e-9, 4)[1] == 1_500_000_000


def test_sides_take_turns():
    order = []
    sides = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    assert take_turns(sides, 3) == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}
    assert order == list("ababab")


def test_latency_is_of_single_steps():
    asked = []
    found = waited(lambda steps: asked.append(steps) or 0.5, 4.0)
    assert found == (0.5, 0.5, 0.5)
    assert asked == [1] * (2 + 8)  # two to warm up, and as many as fit


# The function.


class Tiny(nnx.Module):
    """Cuts an image into patches of 4x4 and has the mean of 8 channels."""

    in_channels = 3

    def __init__(self):
        self.patches = nnx.Conv(3, 8, (4, 4), 4, padding="VALID", rngs=nnx.Rngs(0))

    def __call__(self, images):
        return self.patches(images).mean((1, 2))


def test_throughput_of_a_module(monkeypatch):
    moments = iter(range(10_000))
    monkeypatch.setattr(speed, "time", types.SimpleNamespace(perf_counter=lambda: float(next(moments))))
    found = throughput(Tiny(), batch=4, image_size=32, seconds=30.0, rounds=5)
    # Each look at the clock is a second after the last: a round of six steps has taken one second.
    assert found.steps == 6
    assert found.rounds == (1 / 6,) * 5
    assert found.images_per_second == pytest.approx(4 * 6)
    assert found.quartiles == pytest.approx((24, 24))
    assert found.latency == 1000.0
    assert found.multiply_adds == 8 * 8 * 8 * 4 * 4 * 3
    assert found.compile_seconds == 1.0
    # At least the images, weights and results, of which none can be left out.
    assert found.memory >= 4 * (4 * 32 * 32 * 3 + 8 * 4 * 4 * 3 + 8 + 4 * 8)


def test_training_is_the_step_of_a_small_model(monkeypatch):
    """The step of the trainer, whose state goes round; at odd batches without mixing."""
    whole = speed.training_config

    def small(name, *rest):
        config = whole(name, *rest)
        config.model.options |= {"depth": 1, "width": 16}
        return config

    monkeypatch.setattr(speed, "training_config", small)
    program = speed.prepare("vim_t", batch=1, image_size=32, mode="training")
    assert program.measure(2) > 0
    parameters = count_parameters(abstract_model("vim_t", depth=1, width=16, image_size=32))
    assert program.needed > 4 * 4 * parameters  # these, their average and the two moments of AdamW
    with pytest.raises(UserError, match="a Tiny cannot be measured in training"):
        throughput(Tiny(), mode="training")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"mode": "both"}, "unknown mode 'both'"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"model": "vmamba_x"}, "unknown model 'vmamba_x', did you mean"),
    ],
)
def test_what_cannot_be_measured(asked, words):
    with pytest.raises(UserError, match=words):
        throughput(**{"model": "vmamba_t"} | asked)


def test_a_program_larger_than_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 1000.0)
    with pytest.raises(OutOfMemory, match="out of memory: the program needs 0.00 GiB, 0.00 GiB are free"):
        throughput(Tiny(), image_size=32)


# The command.


def test_rows(programs, tmp_path, capsys):
    file = tmp_path / "speed.json"
    command = ["--models", "vmamba_t", "--size", "32", "64", "--batch", "8", "1", "--rounds", "3", "--json", str(file)]
    assert speed_table.main(command) == 0
    found = rows_of(file)
    assert [(row["images a step"], row["px"]) for row in found] == [(1, 32), (8, 32), (1, 64), (8, 64)]
    for row in found:  # the clock says 0.01 s for each image of 32 pixels
        assert row["images/s"] == pytest.approx(100 / (row["px"] / 32) ** 2)
        assert row["latency of one image, ms"] == pytest.approx(10 * (row["px"] / 32) ** 2)
        facts = [row[name] for name in ("peak memory, MiB", "told by", "compile, s", "multiply-adds, G")]
        assert facts == [3.0, "program", 1.5, 2.0]
        assert row["published top-1, %"] == 82.6
    assert len(programs) == 4  # the latency of one image is that of the batch of one
    assert f"| {100:,.4g} |" in file.with_suffix(".md").read_text()
    assert capsys.readouterr().out.count("| vmamba_t |") == 4


def test_a_batch_of_one_is_measured_for_its_latency(programs, tmp_path):
    file = tmp_path / "speed.json"
    assert speed_table.main(["--models", "vmamba_t", "--batch", "4", *SMALL, "--json", str(file)]) == 0
    assert rows_of(file)[0]["latency of one image, ms"] == pytest.approx(10.0)
    assert [case[1] for case in programs] == [4, 1]


def test_out_of_memory_is_a_row(programs, tmp_path):
    file = tmp_path / "speed.json"
    command = ["--models", "vmamba_t", "--size", "1024", "32", "--batch", "1", "--json", str(file)]
    assert speed_table.main(command) == 0
    too_large, small = rows_of(file)
    assert too_large["note"] == "out of memory"
    assert "images/s" not in too_large
    assert small["images/s"] == pytest.approx(100.0)


def test_a_stopped_command_goes_on(programs, tmp_path, capsys):
    file = tmp_path / "speed.json"
    command = ["--models", "vmamba_t", "--batch", "1", "--rounds", "3", "--json", str(file)]
    line = told(capsys, *command, "--size", "32", "1023")
    assert line == (
        "error: vmamba_t, 1 x 1023 px, float32, inference: the device does not do its work: UNAVAILABLE: the TPU went "
        f"away; the rows so far are in {file}, and the same command goes on"
    )
    (first,) = rows_of(file)
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"notes": [{"text": ["a word"]}]}))
    programs.clear()
    assert speed_table.main([*command, "--size", "32", "64"]) == 0
    assert [case[2] for case in programs] == [64]
    assert rows_of(file)[0] == first
    assert len(rows_of(file)) == 2
    assert "a word" in file.with_suffix(".md").read_text()
    line = told(capsys, *command, "--size", "32", "--seconds", "1")
    assert line == f"error: --json {file} holds rows of another measurement (seconds differ): give another file"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "no model is named: give --models NAME ..., or --table"),
        (["--models", "vmamba_u"], "unknown model 'vmamba_u', did you mean"),
        (["--models", "vmamba_t", "--peers", "timm:deit_tiny"], "peers need --peer-python"),
        (["--table", "vmamba"], "peers need --peer-python"),
        (["--models", "vmamba_t", "--peer-python", "python"], "but no peer: give --peers timm:NAME"),
        (["--models", "vmamba_t", "--batch", "0"], "--batch 0: it must be at least 1"),
        (["--models", "vmamba_t", "--seconds", "nan"], "--seconds nan: give a positive number"),
        (["--models", "vmamba_t", "--rounds", "2"], "--rounds 2: give 3 or more"),
        (["--models", "vmamba_t", "--plot", "a.jpg"], "a.jpg must end in .png"),
        (["--models", "vmamba_t", "--plot", "none/a.png"], "there is no folder none"),
        (["--models", "vmamba_t", "--topology", "v5e-1"], "--topology estimates train steps: give --mode training"),
        (["--models", "vmamba_t", "--topology", "v9-1", "--mode", "training"], "unknown topology 'v9-1'"),
        (["--models", "vmamba_t", "--topology", "h100-8", "--mode", "training"], "no time is known of a GPU"),
    ],
)
def test_mistakes_are_one_line(command, words, capsys):
    assert words in told(capsys, *command)


@pytest.mark.parametrize("text", ["{}", "no json", '{"parts": [{"columns": [{"name": "a"}], "rows": []}]}'])
def test_a_file_of_something_else_is_kept(text, tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text(text)
    assert "give another file" in told(capsys, "--models", "vmamba_t", "--json", str(file))
    assert file.read_text() == text


# Peers.

FAKE = """
import json, os, sys
calls = 0
for line in sys.stdin:
    request = json.loads(line)
    do, model = request["do"], request.get("model", "")
    answer = {}
    if do == "hello":
        assert "PYTHONPATH" not in os.environ
        answer = {"versions": {"torch": "1", "timm": "2"}, "device": "cpu"}
    elif do == "check" and model == "timm:nothing":
        answer = {"error": "timm has no model 'nothing'", "kind": "name"}
    elif do == "load" and model == "timm:large":
        answer = {"error": "out of memory", "kind": "memory"}
    elif do == "load" and model == "timm:deadly":
        os._exit(9)
    elif do == "load":
        calls, answer = 0, {"parameters": 5, "bytes": 2**21}
    elif do == "time":
        calls += 1
        answer = {"seconds": [0.5, 0.5, 0.2, 0.4, 0.6][min(calls, 5) - 1]}  # two to warm up, and three rounds
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def beside(programs, tmp_path, monkeypatch):
    """Return the arguments of a peer that is made up."""
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", "/of/ours")
    monkeypatch.setattr(peers.Peers.__init__, "__kwdefaults__", {"worker": worker})
    return ["--models", "vmamba_t", "--batch", "8", "--mode", "training", *SMALL, "--peer-python", sys.executable]


def test_ratios(beside, tmp_path):
    file = tmp_path / "speed.json"
    assert speed_table.main([*beside, "--peers", "timm:one", "--json", str(file)]) == 0
    ours, theirs = rows_of(file)
    assert ours["images/s"] == pytest.approx(100.0)
    assert ours["mode"] == "training"
    assert "latency of one image, ms" not in ours
    assert theirs["model"] == "timm:one"
    assert theirs["beside"] == "vmamba_t"
    assert theirs["images/s"] == pytest.approx(8 / 0.4)
    assert theirs["its quartiles"] == pytest.approx([8 / 0.5, 8 / 0.3], rel=1e-5)
    assert theirs["ratio"] == pytest.approx(0.4 / 0.08)  # ours takes 0.08 s in every round
    assert theirs["quartiles of the ratio"] == pytest.approx([0.3 / 0.08, 0.5 / 0.08], rel=1e-5)
    assert theirs["peak memory, MiB"] == 2.0
    known = json.loads(file.read_text())["environment"]
    assert known["versions"]["timm"] == "2"


def test_a_case_without_a_peer_is_measured_again(beside, programs, tmp_path):
    file = tmp_path / "speed.json"
    command = [*beside, "--json", str(file), "--peers", "timm:one"]
    for more, measured in (([], 1), ([], 0), (["timm:two"], 1), ([], 0)):
        programs.clear()
        assert speed_table.main([*command, *more]) == 0
        assert len(programs) == measured
    assert [row["model"] for row in rows_of(file)] == ["vmamba_t", "timm:one", "timm:two"]


def test_a_peer_that_fails_is_a_row(beside, tmp_path):
    file = tmp_path / "speed.json"
    assert speed_table.main([*beside, "--peers", "timm:large", "timm:deadly", "timm:one", "--json", str(file)]) == 0
    ours, large, deadly, one = rows_of(file)
    assert large["note"] == "out of memory"
    assert deadly["note"] == "its process ended, as where memory runs out"
    assert ours["images/s"] == pytest.approx(100.0)
    assert one["images/s"] > 0  # of a process that was started again


def test_mistakes_of_peers_are_one_line(beside, tmp_path, capsys):
    assert (
        told(capsys, *beside, "--peers", "timm:nothing") == "error: --peers timm:nothing: timm has no model 'nothing'"
    )
    assert "give timm:NAME, or official:FOLDER:NAME" in told(capsys, *beside, "--peers", "swin")
    for python, words in (
        (tmp_path / "none", "cannot be run: No such file"),
        ("/bin/true", "does not answer as Python"),
    ):
        assert words in told(capsys, *beside[:-1], str(python), "--peers", "timm:one")


def test_the_process_of_peers_imports_nothing_of_ours():
    tree = ast.parse(Path(peer.__file__).read_text())
    names = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_cost_is_of_the_processor_and_at_the_peak():
    def work(seconds):
        began = time.thread_time()
        while time.thread_time() - began < seconds:
            pass

    rested = peer.cost_of(lambda: time.sleep(0.2), 1)
    assert rested["seconds"] < 0.15
    held = []

    def run():
        work(0.05)
        held.append(len(b"a" * (100 << 20)))  # written, then let go

    worked = peer.cost_of(run, 2)
    assert len(held) == 2
    assert worked["seconds"] >= 0.05
    assert worked["bytes"] > rested["bytes"] + (90 << 20)
    asked = peer.Peer()
    asked.loaded["one"] = types.SimpleNamespace(step=run)
    assert set(peer.reply(asked, {"do": "cost", "model": "one", "steps": 1})) == {"seconds", "bytes"}


def test_an_environment_without_torch_or_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    answer = peer.reply(peer.Peer(), {"do": "hello", "threads": 1, "device": "cpu"})
    assert answer["kind"] == "environment"
    assert answer["error"].startswith("torch cannot be imported there")
    monkeypatch.setitem(sys.modules, "timm", None)
    answer = peer.reply(peer.Peer(), {"do": "check", "model": "timm:swin"})
    assert answer["error"].startswith("timm cannot be imported there")
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(list_models=lambda: ["swin_tiny", "deit"]))
    answer = peer.reply(peer.Peer(), {"do": "check", "model": "timm:swin_tini"})
    assert answer == {"error": "timm has no model 'swin_tini'; near: swin_tiny", "kind": "name"}


def test_official_code_is_found_in_a_clone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    torch = types.SimpleNamespace(
        nn=types.SimpleNamespace(functional=None), cuda=types.SimpleNamespace(is_available=lambda: False)
    )
    asked = peer.Peer()
    asked.torch = torch
    file = tmp_path / "mambavision/models/mamba_vision.py"
    config = tmp_path / "swin/classification/configs/vssm/tiny_224.yaml"
    for path, text in {
        file: "@register_pip_model\n@register_model\ndef small(**options):\n    pass\n\n\ndef other():\n    pass\n",
        config: "",
        tmp_path / "swin/classification/models/vmamba.py": "",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    check = lambda model: peer.reply(asked, {"do": "check", "model": model})  # noqa: E731
    assert check(f"official:{tmp_path}:small") == {}
    assert check(f"official:{tmp_path}/swin:tiny_224") == {}
    assert check(f"official:{tmp_path}:smal")["error"] == f"{tmp_path} has no model 'smal'; near: small"
    assert check(f"official:{tmp_path / 'classification'}:small")["error"].startswith(
        f"{tmp_path / 'classification'} is no clone of any of MzeroMiko/VMamba"
    )

    # Code whose libraries are missing is one line, and leaves no module and no path behind.
    for name in ("layers", "models", "models.layers", "models.registry"):
        monkeypatch.setitem(sys.modules, f"timm.{name}", types.ModuleType(name))
    package = file.parent / "__init__.py"
    package.write_text("import nowhere_installed")
    monkeypatch.setattr(peer.Scan, "norms", lambda _: {})
    paths = list(sys.path)
    with pytest.raises(peer.Failure, match="the official code cannot be imported: No module named 'nowhere_installed'"):
        peer.Official(torch, tmp_path).build("small", 32, 0.0)
    assert sys.path == paths
    for name in [name for name, module in sys.modules.items() if peer.Official._is_official(module)]:
        del sys.modules[name]


# Estimates, and what is drawn.


def test_an_estimate_is_of_the_step_that_is_measured(monkeypatch):
    seen = {}

    def inspect(request, *, fast):
        seen["config"], _ = parse_command(["train", *request.arguments])
        memory = {"arguments": 1, "temporaries": 2, "code": 3, "kept_outputs": 4}
        return {
            "times": [{"kind": "kernels", "seconds": 2e-3}, {"kind": "elementwise", "seconds": 3e-3, "memory": 1e-3}],
            **{"collectives": [], "link_bandwidth": 1.0, "memory": memory, "available": 100, "compile_seconds": 7.0},
        }

    monkeypatch.setattr(estimates, "inspect", inspect)
    found = estimates.estimate("vim_t", batch=8, image_size=64, dtype="bfloat16", topology="v5e-1")
    assert found.images_per_second == pytest.approx(8 / 0.005)
    assert found.memory == 10
    assert seen["config"] == speed.training_config("vim_t", 8, 64, "bfloat16")


def test_an_estimate_is_a_row_that_says_so(monkeypatch, tmp_path):
    made = estimates.Estimate(1600.0, 2**20, 7.0, 10**9)
    monkeypatch.setattr(estimates, "estimate", lambda *_, **__: made)
    file = tmp_path / "speed.json"
    command = ["--models", "vmamba_t", "--topology", "v5e-1", "--mode", "training", "--batch", "8"]
    assert speed_table.main([*command, "--json", str(file)]) == 0
    (row,) = rows_of(file)
    assert [row["images/s"], row["told by"], row["note"]] == [1600.0, "compiler", "estimate"]
    assert UNCERTAINTY in file.with_suffix(".md").read_text()


def test_what_is_drawn(programs, tmp_path):
    def row(model, batch, side, speed, mode="inference", top1=80.0):
        names = ("model", "images a step", "px", "type", "mode", "images/s", "published top-1, %")
        return dict(zip(names, (model, batch, side, "float32", mode, speed, top1), strict=True))

    rows = [
        *(row("vmamba_t", 1, side, speed) for side, speed in ((448, 2.0), (224, 8.0), (1024, None))),
        row("vmamba_t", 8, 224, 9.0),
        *(row("timm:swin_tiny_patch4_window7_224", 1, 224, speed) for speed in (5.0, 6.0, 7.0)),
        row("timm:unknown", 1, 224, 1.0, top1=None),
        row("vmamba_t", 1, 224, 3.0, mode="training"),
    ]
    sizes = by_size(rows, "inference")
    assert sizes["vmamba_t, batch 1"] == [(224, 8.0), (448, 2.0)]
    assert sizes["swin_tiny, batch 1"] == [(224, 6.0)]
    assert by_accuracy(rows, "inference") == {"vmamba_t": (9.0, 80.0, True), "swin_tiny": (7.0, 80.0, False)}
    picture = tmp_path / "speed.png"
    assert speed_table.main(["--models", "vmamba_t", "--batch", "1", "--size", "32", "64", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
