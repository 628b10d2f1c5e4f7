"""Two processes with two devices each, over jax.distributed, give the run of one process."""

import json
import socket

import pytest
from command import TINY, environment, run_here, start
from official_weights import save_pth, weights_of
from tiny import get_config

from evmamba_jax.models import abstract_model

LENGTHS = {"duration": 6, "eval_every": 3, "optim.warmup": 2}
ARGUMENTS = (*(f"--config.{name}.steps={n}" for name, n in LENGTHS.items()), "--config.mesh.fsdp=2")
SMALL = f"{TINY}:convolutions"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    # More threads than the machine may have cores: with two, the two processes wait for each other for ever.
    return {"TFDS_DATA_DIR": str(tmp_path_factory.mktemp("data")), "PJRT_NPROC": "16"}


def pair(*arguments, shared, config):
    """Start two joined processes; return exit code and output of each."""
    env = environment(devices=2, JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo", **shared)
    joined = {"enabled": True, "coordinator_address": f"127.0.0.1:{free_port()}", "num_processes": 2}
    flags = [f"--config.distributed.{name}={value}" for name, value in joined.items()]
    processes = [
        start(*arguments, *flags, f"--config.distributed.process_id={i}", config=config, env=env) for i in range(2)
    ]
    told = [process.communicate(timeout=240) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one(shared, tmp_path):
    here = f"--config.data.data_dir={shared['TFDS_DATA_DIR']}"
    code, out, err = run_here(*ARGUMENTS, here, "--workdir", tmp_path / "one", config=SMALL, devices=4)
    assert code == 0, out + err

    told = pair(*ARGUMENTS, "--workdir", tmp_path / "two", shared=shared, config=SMALL)
    assert [code for code, *_ in told] == [0, 0], told
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert "evmamba_t on digits, step 6" in told[0][1]
    assert "step" not in told[1][1]  # only the first process reports


def test_more_processes_than_examples_are_refused(shared, tmp_path):
    few = ("--config.data.train_split=train[:1]", "--config.optim.warmup.steps=1")
    for code, _, err in pair(*ARGUMENTS, *few, "--workdir", tmp_path / "run", shared=shared, config=SMALL):
        assert code == 2, err
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "2 processes" in line
        assert "Traceback" not in err


def test_two_processes_evaluate_an_official_file_as_one(shared, tmp_path):
    config = get_config("convolutions").model
    model = abstract_model(config.name, num_classes=10, in_channels=1, **config.options)
    save_pth(tmp_path / "tiny.pth", weights_of(model))
    arguments = ("--config.eval_only=True", f"--config.init_from={tmp_path / 'tiny.pth'}")
    here = f"--config.data.data_dir={shared['TFDS_DATA_DIR']}"
    code, out, err = run_here(*arguments, here, "--workdir", tmp_path / "one", config=SMALL)
    assert code == 0, out + err

    told = pair(*arguments, "--workdir", tmp_path / "two", shared=shared, config=SMALL)
    assert [code for code, *_ in told] == [0, 0], told
    one, two = ((tmp_path / name / "per_class.csv").read_text() for name in ("one", "two"))
    assert one == two
    assert told[0][1].splitlines()[-1] == out.splitlines()[-1].replace("/one/", "/two/")
    assert "top-1" not in told[1][1]
