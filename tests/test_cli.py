"""Every command ends alike."""

import errno
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import train_tpu
from evmamba_jax import __main__ as evmamba
from evmamba_jax import __version__, cli
from evmamba_jax.errors import UserError

# Each command with what makes it begin, and the function of its module that this calls.
COMMANDS = {
    "train_tpu": (["train_tpu.py", "--config", "configs/digits.py"], "evmamba_jax.training.parse_command"),
    "evmamba_jax.train": (["--config", "configs/digits.py"], "evmamba_jax.training.parse_command"),
    "evmamba_jax.weights.__main__": (["export", "--model", "a", "--checkpoint", "b", "--out", "c"], "export_file"),
    "evmamba_jax.models.__main__": (["vmamba_t"], "model_card"),
    "evmamba_jax.analysis.flops": (["vmamba_t"], "input_size"),
    "evmamba_jax.data.__main__": (["prepare", "digits"], "find_folder"),
    "evmamba_jax.preflight.__main__": (["--topology", "v5e-8"], "parse_command"),
    "evmamba_jax.predict": (["--weights", "x", __file__], "Predictor"),
}


def ends(exception):
    def command():
        raise exception

    return cli.main(command)


def test_what_a_command_returns_is_its_exit_code(capsys):
    assert [cli.main(lambda: None), cli.main(lambda: 0), cli.main(lambda: 1)] == [0, 0, 1]
    assert capsys.readouterr() == ("", "")


def test_a_mistake_is_one_line(capsys):
    assert ends(UserError("there is no x; name a y")) == 2
    assert capsys.readouterr() == ("", "error: there is no x; name a y\n")


def test_ctrl_c_is_one_word(capsys):
    assert ends(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize(
    ("exception", "told"),
    [
        (OSError(errno.EMFILE, "Too many open files", "/data/a"), "too few open files at a time.*ulimit -n.*/data/a"),
        (ValueError("INTERNAL: Too many open files [os_error_code='24']"), "too few open files"),
        (RuntimeError("can't start new thread"), "too few threads and processes.*num_threads"),
        (MemoryError("Unable to allocate 9. TiB for an array"), "not enough memory: lower batch_size"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EFBIG, "File too large", "a"), "no larger files.*ulimit -f"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "set TMPDIR"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/a"), "/data/a cannot be used: Permission denied"),
    ],
)
def test_what_the_machine_refuses_is_one_line_wherever_it_was_found(exception, told, capsys):
    def command():
        try:
            raise exception
        except Exception as error:
            raise RuntimeError("a library of ours failed") from error

    assert (ends(exception), cli.main(command)) == (2, 2)
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert (out, first) == ("", second)
    assert re.fullmatch(f"error: .*{told}.*", first)


@pytest.mark.parametrize(
    "exception", [SystemExit(143), ZeroDivisionError("a fault of ours"), BrokenPipeError("of a worker")]
)
def test_other_ends_pass(exception):
    with pytest.raises(type(exception)) as caught:
        ends(exception)
    assert caught.value is exception


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_that_way(name, monkeypatch, capsys):
    module = train_tpu if name == "train_tpu" else importlib.import_module(name)
    argv, called = COMMANDS[name]
    at = called if "." in called else f"{name}.{called}"
    for exception, code, told in ((KeyboardInterrupt(), 130, "interrupted"), (UserError("no x"), 2, "error: no x")):

        def end(*args, exception=exception, **kwargs):
            raise exception

        monkeypatch.setattr(at, end)
        assert module.main(argv) == code
        assert capsys.readouterr().err == f"{told}\n"


# The command ``evmamba``.


def told(capsys, *argv, main=evmamba.main) -> tuple[int, str, str]:
    try:
        code = main(list(argv))
    except SystemExit as end:  # argparse, after --help
        code = end.code
    return code, *capsys.readouterr()


def test_alone_it_lists_its_commands(capsys):
    code, out, _ = told(capsys)
    assert code == 2
    assert told(capsys, "--help") == (0, out, "")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ") and "-h" not in line] == [
        "--version",
        *evmamba.COMMANDS,
    ]
    assert told(capsys, "--version") == (0, f"evmamba-jax {__version__}\n", "")


def test_an_unknown_command_is_one_line(capsys):
    listed = ", ".join(evmamba.COMMANDS)
    for argv, nearest in ((["modles", "vim_t"], ", did you mean 'models'?"), (["--verbose", "models"], "")):
        told_line = f"error: unknown command {argv[0]!r}{nearest}; allowed: {listed}\n"
        assert told(capsys, *argv) == (2, "", told_line)


@pytest.mark.parametrize("name", evmamba.COMMANDS)
def test_each_command_has_one_kind_of_help_under_both_its_names(name, capsys):
    code, out, err = told(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: evmamba {name} ")
    assert "-h, --help" in out
    module = importlib.import_module(evmamba.COMMANDS[name][0])
    code, out, err = told(capsys, "--help", main=module.main)
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: python -m {module.__name__.removesuffix('.__main__')} ")


@pytest.mark.parametrize("name", evmamba.COMMANDS)
def test_each_command_refuses_an_unknown_option_in_one_line(name, capsys):
    needed = {
        "predict": ["--weights", "x", "y"],
        "weights": ["export"],
        "data": ["prepare", "x"],
        "analysis": ["flops", "x"],
    }
    code, out, err = told(capsys, name, *needed.get(name, []), "--no-such-option")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_the_help_of_a_config_lists_its_keys(capsys):
    code, out, _ = told(capsys, "train", "--config", "evmamba_t:paper", "--config.optim.lr=0.5", "--help")
    assert code == 0
    keys = [line.strip() for line in out.splitlines() if line.startswith("  --config.")]
    assert {"--config.optim.lr=0.5", "--config.optim.betas=0.9,0.999", "--config.model.name=evmamba_t"} <= {*keys}


# What surrounds a command: pipes, terminals, packages, devices.


def in_a_process(code: str, **env: str) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    root = str(Path(cli.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; from evmamba_jax import cli; sys.exit(cli.main(lambda: {code}))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=kept | {"PYTHONPATH": root} | env,
    )


@pytest.mark.parametrize("code", ["print('x')", "print('x' * 1_000_000)", "print('x'), sys.exit(0)"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_is_no_error(code, unbuffered):
    with in_a_process(f"({code}, None)[1]", PYTHONUNBUFFERED=unbuffered) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_what_a_terminal_cannot_show_is_escaped():
    with in_a_process(r"print('é 写 \udce9')", PYTHONIOENCODING="ascii") as process:
        assert process.communicate() == (rb"\xe9 \u5199 \udce9" + os.linesep.encode(), b"")


def test_a_package_that_is_missing_is_named(capsys, monkeypatch):
    assert ends(ModuleNotFoundError("No module named 'tqdm.auto'", name="tqdm.auto")) == 2
    assert capsys.readouterr().err == (
        "error: tqdm is needed here and not installed: install evmamba-jax again in this environment\n"
    )
    monkeypatch.setattr(sys, "platform", "win32")
    assert ends(ModuleNotFoundError(name="array_record")) == 2
    assert "there is not for Windows" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):
        ends(ModuleNotFoundError(name="evmamba_jax.gone"))


@pytest.mark.parametrize(
    ("devices", "found"), [([], "cpu"), (["accel0"], None), (["vfio/0"], None), (["vfio/vfio"], "cpu")]
)
def test_jax_looks_for_a_tpu_only_where_one_is(devices, found, tmp_path, monkeypatch):
    for device in devices:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    monkeypatch.setattr(cli, "_DEVICES", tmp_path)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: "installed")
    monkeypatch.setattr(cli, "entry_points", lambda group: [])
    monkeypatch.delenv("JAX_PLATFORMS")
    cli.main(lambda: None)
    assert os.environ.pop("JAX_PLATFORMS", None) == found
    assert jax.config.jax_platforms == "cpu"  # as the tests began


@pytest.mark.parametrize("other", [{"JAX_PLATFORMS": "tpu"}, {"plugin": "cuda"}])
def test_the_users_choice_and_other_accelerators_stand(other, tmp_path, monkeypatch):
    for name in ("JAX_PLATFORMS", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(cli, "_DEVICES", tmp_path)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: "installed")
    monkeypatch.setattr(cli, "entry_points", lambda group: other.get("plugin", []))
    if "JAX_PLATFORMS" in other:
        monkeypatch.setenv("JAX_PLATFORMS", other["JAX_PLATFORMS"])
    cli.main(lambda: None)
    assert os.environ.get("JAX_PLATFORMS") == other.get("JAX_PLATFORMS")
    assert ("TPU_WORKER_HOSTNAMES" in os.environ) == ("plugin" in other)


def test_nothing_is_said_before_the_commands_own_first_line():
    with in_a_process("print(__import__('jax').devices()[0].platform)") as process:
        out, err = process.communicate()
    assert err == b""
    assert out.split()


# What an import costs.


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import evmamba_jax", ["jax", "flax", "numpy", "orbax", "matplotlib"]),
        ("import evmamba_jax.__main__", ["jax", "flax", "numpy", "orbax", "matplotlib"]),
        (
            "from evmamba_jax import create_model",
            ["evmamba_jax.data", "evmamba_jax.weights", "tensorflow_datasets", "grain", "matplotlib", "sklearn", "PIL"],
        ),
    ],
)
def test_an_import_loads_only_what_it_needs(statement, absent):
    code = f"{statement}\nimport json, sys\nprint(json.dumps([*sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, cwd=Path(cli.__file__).parents[1]
    )
    assert not {*absent} & {*json.loads(done.stdout)}


def test_what_the_package_shows():
    import evmamba_jax

    assert {*evmamba_jax.__all__} <= {*dir(evmamba_jax)}
    assert evmamba_jax.list_models("vim_t") == ["vim_t"]
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
        _ = evmamba_jax.create_modle


@pytest.mark.parametrize("given", ["", "glibc.malloc.arena_max=2"])
@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc's")
def test_training_takes_large_pages_unless_memory_is_set_otherwise(given, tmp_path):
    config = tmp_path / "told.py"
    config.write_text("import os, sys\nprint(os.getpid(), os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])\n1 / 0\n")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-m", "evmamba_jax.train", "--config", str(config), "--config.seed=3"]
    environment |= {"GLIBC_TUNABLES": given} if given else {}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    told, _ = process.communicate(timeout=120)
    words = ["--config", str(config), "--config.seed=3"]
    assert told.splitlines()[0] == f"{process.pid} {given or 'glibc.malloc.hugetlb=1'} {words}"
