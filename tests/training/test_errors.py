"""Bad input: the command leaves with exit code 2, one line that says what to do, and nothing half-written."""

import shutil
import subprocess
from pathlib import Path

import pytest
from command import ROOT, TINY, refused_here, run

from evmamba_jax.data.sources import prepare
from evmamba_jax.training import parse_command

DIGITS = "configs/digits.py"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The prepared digits."""
    folder = tmp_path_factory.mktemp("data")
    prepare("digits", folder)
    return folder


def refused_command(*arguments, config=DIGITS) -> str:
    """Run the command in a process of its own, check that it is refused as it should be, and return the line."""
    code, out, err = run(*arguments, config=config)
    assert code == 2, out + err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def refused(*arguments, config=DIGITS, devices=1) -> str:
    """Do the same in this process, which is sooner done; two kinds of mistakes also run as commands below."""
    return refused_here(*arguments, config=config, devices=devices)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optim.learning_rate=1", "unknown config key 'optim.learning_rate', did you mean 'optim."),
        ("--config.optim.lrr=1", "unknown config key 'optim.lrr', did you mean 'optim.lr'"),
        ("--config.optim.lr=fast", "could not convert string to float: 'fast'"),
        ("--config.batch_size=2.5", "invalid literal for int() with base 10: '2.5'"),
        (
            "--config.model.options=3",
            "config key 'model.options' cannot be set as a whole; change it in the config file",
        ),
        ("--config.optim=3", "config key 'optim' cannot be set as a whole; set its parts, e.g. --config.optim.name="),
        ("--confg.optim.lr=1", "Unknown command line flag 'confg.optim.lr'"),
        ("more", "unexpected argument 'more'"),
        (
            "--config.model.dtype=float16",
            "config.model.dtype='float16' is not allowed: it must be 'bfloat16' or 'float32'",
        ),
        ("--config.optim.name=sgd", "config.optim.name='sgd' is not allowed: it must be 'adamw' or 'lamb'"),
        (
            "--config.optim.mesa=-1",
            "config.optim.mesa=-1.0 is not allowed: it must be 0 or more",
        ),
        (
            "--config.data.mixup_mode=half",
            "data.mixup_mode='half' is not allowed: it must be 'batch', 'pair' or 'elem'",
        ),
        ("--config.data.image_size=0", "data.image_size=0 is not allowed"),
        ("--config.duration.epochs=0", "config.duration is Duration(epochs=0.0, steps=0)"),
    ],
)
def test_wrong_options_are_named(override, message, tmp_path):
    assert message in refused("--workdir", tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_a_distillation_that_would_never_begin_is_named(data_dir, tmp_path):
    late = [f"--config.data.data_dir={data_dir}", "--config.optim.mesa=1", "--config.optim.mesa_start.epochs=60"]
    line = refused("--workdir", tmp_path / "run", *late)
    assert "config.optim.mesa_start is 1320 steps and the whole run 1320: let MESA begin" in line


def test_unknown_key_as_a_command(tmp_path):
    assert "did you mean 'optim.lr'" in refused_command("--config.optim.lrr=1", "--workdir", tmp_path / "run")


def test_missing_config_and_variant(tmp_path):
    assert "no_such.py" in refused(config="configs/no_such.py")
    assert "unknown variant 'papr', did you mean 'paper'" in refused(config="configs/evmamba_t.py:papr")


def test_imagenet_that_is_not_there_names_the_command_that_prepares_it(tmp_path):
    line = refused(f"--config.data.data_dir={tmp_path}", config="configs/evmamba_t.py")
    assert "imagenet2012" in line
    assert str(tmp_path) in line
    assert "python -m evmamba_jax.data prepare imagenet2012" in line


def test_incomplete_and_foreign_data_folders(data_dir, tmp_path):
    shutil.copytree(data_dir / "digits", tmp_path / "digits")
    shard = next((tmp_path / "digits").rglob("*train*array_record*"))
    shard.unlink()
    line = refused(f"--config.data.data_dir={tmp_path}", "--workdir", tmp_path / "run")
    assert str(tmp_path / "digits") in line
    shutil.rmtree(tmp_path / "digits")
    (tmp_path / "digits" / "mine").mkdir(parents=True)
    (tmp_path / "digits" / "notes.txt").write_text("mine")
    assert "is not a TFDS folder" in refused(f"--config.data.data_dir={tmp_path}", "--workdir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batch_that_does_not_divide(data_dir, tmp_path):
    common = (f"--config.data.data_dir={data_dir}", "--workdir", tmp_path / "run", "--config.accumulation=2")
    line = refused("--config.batch_size=40", *common, devices=8)
    assert "config.batch_size is 40; it must be a multiple of devices x accumulation = 8 x 2 = 16" in line
    assert "their product must be the 8 devices" in refused("--config.mesh.fsdp=3", *common, devices=8)


def test_image_too_small(data_dir, tmp_path):
    line = refused(
        f"--config.data.data_dir={data_dir}",
        "--workdir",
        tmp_path / "run",
        "--config.data.image_size=2",
        config=tiny_patch(tmp_path),
    )
    assert "image size 2x2 is too small: height and width must be at least 4" in line


def tiny_patch(folder: Path) -> str:
    """Write a config whose patches are larger than the image will be."""
    text = (ROOT / "tests" / "training" / "tiny.py").read_text().replace('"patch_size": 2', '"patch_size": 4')
    (folder / "patch4.py").write_text(text)
    return str(folder / "patch4.py")


def test_unknown_model(tmp_path, data_dir):
    line = refused("--config.model.name=evmamba_x", f"--config.data.data_dir={data_dir}", "--workdir", tmp_path / "run")
    assert "unknown model 'evmamba_x', did you mean 'evmamba_" in line


def test_unwritable_work_folder(data_dir, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    line = refused(f"--config.data.data_dir={data_dir}", "--workdir", tmp_path / "file" / "run")
    assert str(tmp_path / "file" / "run") in line


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)], check=False)
    if mounted.returncode:
        pytest.skip("a file system of one's own takes the right to mount")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_full_work_folder(data_dir, small_disk):
    line = refused(f"--config.data.data_dir={data_dir}", "--workdir", small_disk, config=f"{TINY}:convolutions")
    assert f"cannot write in {small_disk / 'checkpoints'}: a checkpoint needs" in line
    assert not list((small_disk / "checkpoints").iterdir())


def test_help_is_short_and_names_the_options():
    code, out, _ = run("--help")
    assert code == 0
    assert len(out.splitlines()) < 25
    for word in ("--config", "--workdir", "configs/digits.py", "eval_only"):
        assert word in out


def test_overrides_reach_the_config():
    config, workdir = parse_command(
        [
            "train_tpu.py",
            f"--config={ROOT / 'configs/evmamba_t.py'}:paper",
            "--config.optim.lr=0.5",
            "--config.duration.steps=7",
        ]
    )
    assert (config.optim.lr, config.duration.in_steps(10), config.batch_size) == (0.5, 7, 1024)
    assert workdir == Path("runs/evmamba_t_paper")


def test_a_config_file_that_fails_is_told_in_one_line(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    assert refused(config=str(tmp_path / "broken.py")).endswith("ZeroDivisionError: division by zero")
    (tmp_path / "other.py").write_text("def get_config():\n    return {'lr': 1}\n")
    assert "get_config() returned a" in refused(config=str(tmp_path / "other.py"))


def test_processes_that_cannot_be_joined():
    line = refused_command("--config.distributed.enabled=True")
    assert "the processes cannot be joined" in line
    assert "config.distributed.coordinator_address" in line
