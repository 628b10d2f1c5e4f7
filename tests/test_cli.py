"""Every command ends alike."""

import errno
import importlib
import re

import pytest

import train_tpu
from evmamba_jax import cli
from evmamba_jax.errors import UserError

# Each command with what makes it begin, and the function of its module that this calls.
COMMANDS = {
    "train_tpu": (["train_tpu.py", "--config", "configs/digits.py"], "evmamba_jax.training.parse_command"),
    "evmamba_jax.weights.__main__": (["export", "--model", "a", "--checkpoint", "b", "--out", "c"], "export_file"),
    "evmamba_jax.models.__main__": (["vmamba_t"], "model_card"),
    "evmamba_jax.analysis.__main__": (["vmamba_t"], "model_card"),
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
        (PermissionError(errno.EACCES, "Permission denied", "/root/a"), "/root/a cannot be used: Permission denied"),
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


@pytest.mark.parametrize("exception", [SystemExit(143), ZeroDivisionError("a fault of ours")])
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
