"""The whole way with miniature ImageNet archives of real photographs: prepare, train, kill, resume, evaluate."""

import json
import signal
import subprocess
import sys

import pytest
from command import ROOT, environment, refused_here, run, run_here, start
from mini_imagenet import make_train_tar, make_validation_tar

from evmamba_jax.data import imagenet

CONFIG = """
from evmamba_jax.data.config import DataConfig
from evmamba_jax.training.config import Config, Duration, ModelConfig, OptimConfig

def get_config():
    return Config(
        model=ModelConfig("evmamba_t", 0.1, "float32", options={"width": 8, "depths": (1, 0, 1, 0), "d_state": 2}),
        data=DataConfig("imagenet2012", image_size=32, crop_pct=0.875, num_threads=2),
        optim=OptimConfig(warmup=Duration(steps=2)),
        batch_size=64,
        # 16 steps of 64 images: one pass over the 1000 training images and a little more
        duration=Duration(steps=16),
        log_every=Duration(steps=2),
        eval_every=Duration(steps=8),
        save_every=Duration(steps=2),
    )
"""


RECIPE = f"""
import runpy

def get_config():
    config = runpy.run_path({str(ROOT / "configs" / "evmamba_t.py")!r})["get_config"]()
    config.model.options = {{"width": 16, "depths": (1, 1, 2, 1), "d_state": 4}}
    return config
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    make_train_tar(folder / "train.tar", images_per_class=1)
    make_validation_tar(folder / "val.tar", images=50)
    imagenet.prepare_imagenet(
        folder / "train.tar", folder / "val.tar", folder / "data", train_images=1000, validation_images=50
    )
    (folder / "config.py").write_text(CONFIG)
    return folder, environment(TFDS_DATA_DIR=str(folder / "data"))


def test_prepare_train_kill_resume(prepared, tmp_path):
    folder, env = prepared
    config, data = str(folder / "config.py"), f"--config.data.data_dir={folder / 'data'}"
    code, out, err = run_here(data, "--workdir", tmp_path / "whole", config=config)
    assert code == 0, out + err
    assert "on imagenet2012, step 16" in out
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["examples"] for row in rows if "top1" in row] == [50, 50]

    killed = start("--workdir", tmp_path / "killed", config=config, env=env)
    for line in killed.stdout:
        if line.startswith("step 4/"):
            break
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    code, out, err = run_here(data, "--workdir", tmp_path / "killed", config=config)
    assert code == 0, out + err
    whole, resumed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed"))
    assert whole == resumed


def test_the_published_recipe_on_small_images(prepared, tmp_path):
    """All of configs/evmamba_t.py but sizes and length: train, evaluate, convert, evaluate that."""
    folder, env = prepared
    (tmp_path / "small.py").write_text(RECIPE)
    lengths = {"duration": 12, "optim.warmup": 4, "log_every": 4, "save_every": 4, "eval_every": 12}
    small = [f"--config.{name}.steps={n}" for name, n in lengths.items()]
    small += ["--config.data.image_size=32", "--config.batch_size=16", "--config.data.num_threads=2"]
    config = str(tmp_path / "small.py")
    code, out, err = run("--workdir", tmp_path / "run", *small, config=config, env=env)
    assert code == 0, out + err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12, 12]
    trained = rows[-1]
    assert trained["examples"] == 50
    assert trained["eval_loss"] != trained["ema_eval_loss"]

    file = tmp_path / "weights.safetensors"
    command = [sys.executable, "-m", "evmamba_jax.weights", "export", "--model", "evmamba_t", "--out", str(file)]
    done = subprocess.run([*command, "--checkpoint", str(tmp_path / "run")], env=env, cwd=ROOT, check=False)
    assert done.returncode == 0
    small += [f"--config.data.data_dir={folder / 'data'}", "--config.eval_only=True", f"--config.init_from={file}"]
    code, out, err = run_here(*small, "--workdir", tmp_path / "evaluated", config=config)
    assert code == 0, out + err
    better = "ema_" if trained["ema_top1"] > trained["top1"] else ""  # which is what was exported
    assert f"top-1 {trained[f'{better}top1']:.2f} %, top-5 {trained[f'{better}top5']:.2f} %" in out


def test_the_command_refuses_archives_that_are_not_imagenet(prepared, tmp_path):
    folder, env = prepared
    command = [sys.executable, "-m", "evmamba_jax.data", "prepare", "imagenet2012", "--data-dir", str(tmp_path / "out")]
    tars = ["--train", str(folder / "train.tar"), "--val", str(folder / "val.tar")]
    done = subprocess.run(command + tars, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "val.tar is not the whole validation tar of 50000 images: it lacks 49950" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    done = subprocess.run(
        [*command, "--train", "no.tar", *tars[2:]], capture_output=True, text=True, env=env, cwd=ROOT, check=False
    )
    assert done.returncode == 2
    assert "no.tar" in done.stderr
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("*array_record*"))


@pytest.fixture(scope="module")
def corrupt(prepared, tmp_path_factory):
    """The same with the first image of each split cut short; our preparation refuses such tars, TFDS's own does not."""
    folder = tmp_path_factory.mktemp("corrupt")
    whole = imagenet._read

    def cut(image):
        data = whole(image)
        return data[: len(data) // 2] if image.name in ("n01440764_0.JPEG", "ILSVRC2012_val_00000001.JPEG") else data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagenet, "_read", cut)
        tars = prepared[0] / "train.tar", prepared[0] / "val.tar"
        imagenet.prepare_imagenet(*tars, folder, train_images=1000, validation_images=50)
    return f"--config.data.data_dir={folder}"


def test_a_corrupt_image_is_named_or_skipped_and_counted(prepared, corrupt, tmp_path):
    config = str(prepared[0] / "config.py")
    err = refused_here(corrupt, "--workdir", tmp_path / "run", config=config)
    assert "n01440764_0.JPEG" in err or "ILSVRC2012_val_00000001.JPEG" in err
    assert "data.on_corrupt" in err

    skip = "--config.data.on_corrupt=skip"
    code, out, err = run_here(corrupt, "--workdir", tmp_path / "skip", skip, config=config)
    assert code == 0, out + err
    rows = [json.loads(line) for line in (tmp_path / "skip" / "metrics.jsonl").read_text().splitlines()]
    assert 1 <= sum(row["corrupt"] for row in rows if "loss" in row) <= 2
    evaluation = rows[-1]
    assert (evaluation["eval_corrupt"], evaluation["examples"]) == (1, 49)
