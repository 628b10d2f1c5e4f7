"""Checkpoints: what is saved comes back, what is damaged is named, and a kill loses nothing that was complete."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from evmamba_jax.checkpoints import Checkpoints, load_model, save_model
from evmamba_jax.errors import UserError

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask={"head.kernel": True, "norm.scale": False}))


def make_items(seed: int) -> dict:
    """A small train state of the trainer's kinds: flat dicts, an optax state, scalars, two dtypes, an empty dict."""
    rng = np.random.default_rng(seed)
    params = {
        "head.kernel": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32),
        "norm.scale": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
    }
    grads = jax.tree.map(jnp.ones_like, params)
    return {
        "model": {"params": params, "batch_stats": {}},
        "ema": {"params": jax.tree.map(lambda p: p * 2, params), "batch_stats": {}},
        "train": {"opt": TX.update(grads, TX.init(params), params)[1], "step": jnp.int32(seed)},
    }


def abstract(items, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), items)


def save_steps(directory, *steps: int) -> None:
    with Checkpoints(directory, keep_last=10) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_items(step), meta={"step": step})


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_restore_gives_back_structure_values_and_meta(tmp_path):
    items = make_items(7)
    expected = jax.tree.map(np.array, items)
    meta = {"model": "evmamba_t", "options": {"num_classes": 10}, "seed": 3, "rate": 0.1, "by_number": {10: 1, 9: 2}}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.restore(abstract(items)) is None
        assert checkpoints.restore_meta() is None
        checkpoints.save(40, items, meta=meta, metrics={"top1": 91.5})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        step, restored, restored_meta = checkpoints.restore(abstract(items))
        assert checkpoints.restore_meta() == restored_meta
    assert step == 40
    assert restored_meta == json.loads(json.dumps(meta))
    chex.assert_trees_all_equal_structs(restored, items)
    chex.assert_trees_all_equal_dtypes(restored, items)
    chex.assert_trees_all_equal(jax.tree.map(np.array, restored), expected)


def test_part_of_the_items_can_be_restored(tmp_path):
    save_steps(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        _, restored, _ = checkpoints.restore({"ema": abstract(make_items(1)["ema"])})
    chex.assert_trees_all_equal(restored, {"ema": make_items(1)["ema"]})


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    overwrite = jax.jit(lambda x: jnp.full_like(x, -1.0), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        x = jnp.arange(1_000_000.0)
        checkpoints.save(1, {"model": {"params": {"x": x}, "batch_stats": {}}}, meta={})
        overwrite(x).block_until_ready()
    np.testing.assert_array_equal(load_model(tmp_path)[0]["x"], np.arange(1_000_000, dtype=np.float32))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((8, 1), PartitionSpec()), ((1, 8), PartitionSpec("fsdp")), ((2, 4), PartitionSpec("data", "fsdp"))],
)
def test_restores_into_other_shardings(tmp_path, shape, spec):
    def sharding(shape, spec):
        return NamedSharding(jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2), spec)

    w = np.arange(64.0, dtype=np.float32).reshape(16, 4)
    with Checkpoints(tmp_path) as checkpoints:
        saved = jax.device_put(w, sharding((4, 2), PartitionSpec("fsdp")))
        checkpoints.save(1, {"model": {"w": saved}}, meta={})
        target = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding(shape, spec))
        restored = checkpoints.restore({"model": {"w": target}})[1]["model"]["w"]
    assert restored.sharding == target.sharding
    np.testing.assert_array_equal(np.asarray(restored), w)


# Which checkpoints stay


def test_keeps_the_last_and_the_best(tmp_path):
    scores = {1: 50.0, 2: 90.0, 3: 90.0, 4: 10.0, 5: float("nan"), 6: None}
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for step, score in scores.items():
            metrics = None if score is None else {"top1": score}
            checkpoints.save(step, make_items(step), meta={}, metrics=metrics)
        assert checkpoints.steps() == [2, 5, 6]  # 2 was the first to reach 90
        assert checkpoints.best_step() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]
    with Checkpoints(tmp_path, keep_last=1, keep_best=2) as checkpoints:  # read back from disk
        assert checkpoints.best_step() == 2
        checkpoints.save(7, make_items(7), meta={}, metrics={"top1": 95.0})
        assert checkpoints.steps() == [2, 7]
        assert checkpoints.best_step() == 7


def test_the_best_by_another_metric_of_which_less_is_better(tmp_path):
    chosen = {"keep_last": 1, "keep_best": 1, "best_metric": "loss", "higher": False}
    with Checkpoints(tmp_path, **chosen) as checkpoints:
        for step, loss in enumerate([3.0, 2.0, float("nan"), 2.0], start=1):
            checkpoints.save(step, {"masks": {"x": jnp.ones(2)}}, meta={}, metrics={"loss": loss, "top1": step})
        assert checkpoints.steps() == [2, 4]
        assert checkpoints.best_step() == 2
    with Checkpoints(tmp_path, **chosen) as checkpoints:  # read back from disk
        assert checkpoints.best_step() == 2
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() == 4


def test_no_metrics_no_best(tmp_path):
    save_steps(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() is None


def test_keep_last_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="keep_last is 0"):
        Checkpoints(tmp_path, keep_last=0)


def test_the_current_step_is_not_written_again_but_takes_late_metrics(tmp_path):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in files_of(tmp_path / "3") if path.name != "checkpoint.json"}

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, make_items(3), meta={"evaluated": False})
        checkpoints.wait()
        before = stamps()
        checkpoints.save(3, make_items(3), meta={"evaluated": None})
        assert checkpoints.restore_meta() == {"evaluated": False}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(abstract(make_items(3)))
        checkpoints.save(3, make_items(3), meta={"evaluated": True}, metrics={"top1": 40.0})
        assert checkpoints.restore_meta() == {"evaluated": True}
        assert checkpoints.best_step() == 3
    assert stamps() == before
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(make_items(3)))[2] == {"evaluated": True}
        assert checkpoints.best_step() == 3


@pytest.mark.parametrize("step", [100, 200])
def test_refuses_to_save_over_another_run(tmp_path, step):
    save_steps(tmp_path, 200)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=f"cannot save step {step}: .* already holds checkpoint 200"),
    ):
        checkpoints.save(step, make_items(step), meta={})


# Damage


def damages(path: Path):
    """Yield (what was done, do it) for the ways in which a file gets damaged."""
    content = path.read_bytes()
    flipped = bytes([*content[: len(content) // 2], content[len(content) // 2] ^ 1, *content[len(content) // 2 + 1 :]])
    yield "halved", lambda: path.write_bytes(content[: len(content) // 2])
    yield "emptied", lambda: path.write_bytes(b"")
    yield "a bit flipped", lambda: path.write_bytes(flipped)
    yield "deleted", path.unlink


def test_every_damage_to_every_file_is_named_or_harmless(tmp_path, caplog):
    """With the newest of two checkpoints damaged, either the other is used and a line says so, or nothing is lost."""
    whole = tmp_path / "whole"
    with Checkpoints(whole) as checkpoints:
        for step in (200, 300):
            items = {"model": make_items(step)["model"]}
            checkpoints.save(step, items, meta={"step": step})
    target = abstract(items)
    names = [path.relative_to(whole) for path in files_of(whole / "300")]
    assert len(names) > 10
    harmless = set()
    for name in names:
        for what, _ in damages(whole / name):
            broken = tmp_path / "broken"
            shutil.copytree(whole, broken)
            dict(damages(broken / name))[what]()
            caplog.clear()
            with Checkpoints(broken) as checkpoints:
                step, items, meta = checkpoints.restore(target)
                assert meta == {"step": step}
                chex.assert_trees_all_equal(items, {name: make_items(step)[name] for name in items})
                if step == 300:
                    harmless.add(name.name)
                    assert not caplog.records
                else:
                    assert step == 200
                    (record,) = caplog.records
                    assert record.levelno == logging.WARNING
                    message = record.getMessage()
                    assert message.startswith("checkpoint 300 is damaged ("), message
                    assert message.endswith("moved to damaged-300; continuing from 200"), message
                    assert name.relative_to("300").as_posix() in message
                    assert checkpoints.steps() == [200]
                    kept = len(files_of(broken / "damaged-300"))
                    assert kept == len(names) - (what == "deleted"), "a damaged checkpoint is kept for inspection"
            shutil.rmtree(broken)
    assert harmless <= {"commit_success.txt", "_CHECKPOINT_METADATA"}  # which nothing reads


def test_a_run_goes_on_after_damage(tmp_path, caplog):
    save_steps(tmp_path, 100, 200, 300)
    for step in (200, 300):
        (tmp_path / str(step) / "checkpoint.json").unlink()
    for attempt in range(2):
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.restore(abstract(make_items(0)))[0] == 100
            checkpoints.save(200, make_items(200), meta={})
            assert checkpoints.steps() == [100, 200]
        (tmp_path / "200" / "checkpoint.json").write_text("{")
        assert (tmp_path / "damaged-200").is_dir()
        assert (tmp_path / "damaged-200-2").is_dir() == (attempt == 1)
    assert len(caplog.records) == 3


def test_all_damaged_is_an_error_that_moves_nothing(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / str(step) / "model" / "_METADATA").write_text("")
    for _ in range(2):
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=r"damaged \(2: .*_METADATA.*; 1: "):
            checkpoints.restore(abstract(make_items(0)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_another_model_is_an_error_and_not_damage(tmp_path):
    save_steps(tmp_path, 5)
    items = make_items(5)
    items["model"]["params"]["head.kernel"] = jnp.zeros((8, 7))
    items["model"]["params"]["head.bias"] = jnp.zeros(7)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError) as caught:
            checkpoints.restore(abstract(items))
        assert "model/params/head.bias is absent there and float32[7] here" in str(caught.value)
        assert "model/params/head.kernel is float32[8, 6] there and float32[8, 7] here" in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="has no 'extra', only ema, model, train"):
            checkpoints.restore({"extra": abstract(items["model"])})
        cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16, sharding=x.sharding), make_items(5))
        with pytest.raises(UserError, match="and 7 more"):
            checkpoints.restore(cast)
        assert checkpoints.steps() == [5]


# Kills and storage


def test_what_kills_leave_is_ignored_and_swept(tmp_path):
    save_steps(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "2", tmp_path / "0.deleting")
    (tmp_path / "notes.txt").write_text("mine")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.restore(abstract(make_items(0)))[0] == 2
        assert (tmp_path / "3.orbax-checkpoint-tmp").is_dir(), "reading sweeps nothing: the writer may be at work"
        checkpoints.save(3, make_items(3), meta={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "notes.txt"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write in .*file/checkpoints \(Not a directory\)"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_disk_that_fills_up_is_one_line_and_loses_nothing(tmp_path):
    """A limit on the size of files stands for the full disk; it holds for a whole process, hence a child."""
    code = """
import resource, sys
import jax
from evmamba_jax.checkpoints import Checkpoints
from evmamba_jax.errors import UserError
small, large = ({"model": {"x": jax.random.normal(jax.random.key(0), (n,))}} for n in (10, 200_000))
try:
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, small, meta={})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        checkpoints.save(2, large, meta={})
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.startswith(f"cannot write in {tmp_path} (File too large): "), done
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]


def test_nothing_of_orbax_reaches_the_terminal(tmp_path):
    code = """
import sys
from absl import app
import jax.numpy as jnp
from evmamba_jax.checkpoints import Checkpoints, load_model
def main(argv):
    with Checkpoints(argv[1]) as checkpoints:
        checkpoints.save(1, {"model": {"params": {"x": jnp.ones(3)}, "batch_stats": {}}}, meta={})
    load_model(argv[1])
app.run(main)  # which sets absl's level to INFO
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Models


def test_a_saved_model_is_loaded_from_every_folder_that_names_it(tmp_path):
    params = {"head.kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}
    stats = {"norm.mean": jnp.full(2, 0.5, jnp.bfloat16)}
    save_model(tmp_path / "run" / "checkpoints", params=params, batch_stats=stats, meta={"model": "evmamba_t"})
    for folder in ("run", "run/checkpoints", "run/checkpoints/0"):
        loaded = load_model(tmp_path / folder)
        assert isinstance(loaded[0]["head.kernel"], np.ndarray)
        chex.assert_trees_all_equal_dtypes(loaded[:2], (params, stats))
        chex.assert_trees_all_equal(loaded[:2], (params, jax.tree.map(np.asarray, stats)))
        assert loaded[2] == {"model": "evmamba_t"}


def test_a_converted_model_and_a_run_are_one_format(tmp_path):
    items = make_items(4)
    save_model(tmp_path, **items["model"], meta={"from": "torch"})
    with Checkpoints(tmp_path) as checkpoints:
        step, restored, meta = checkpoints.restore({"model": abstract(items["model"])})
    assert (step, meta) == (0, {"from": "torch"})
    chex.assert_trees_all_equal(restored["model"], items["model"])


def test_load_model_takes_the_newest_undamaged_step_and_changes_nothing(tmp_path, caplog):
    save_steps(tmp_path, 9, 10, 11)
    (tmp_path / "11" / "model" / "_METADATA").write_text("")
    before = files_of(tmp_path)
    params, _, meta = load_model(tmp_path, ema=True)
    chex.assert_trees_all_equal(params, jax.tree.map(np.asarray, make_items(10)["ema"]["params"]))
    assert meta == {"step": 10}
    assert "checkpoint 11 is damaged" in caplog.text
    assert files_of(tmp_path) == before
    assert load_model(tmp_path / "9")[2] == {"step": 9}


def test_load_model_says_what_is_wrong(tmp_path):
    save_model(tmp_path / "model", params={"w": np.ones(2)}, batch_stats={}, meta={})
    with pytest.raises(UserError, match="has no moving average"):
        load_model(tmp_path / "model", ema=True)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "weights.pth").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"weights.pth is not a folder.*evmamba_jax.weights convert"):
        load_model(tmp_path / "weights.pth")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no checkpoint in .*empty: it has no folders named by step numbers"):
        load_model(tmp_path / "empty")
    with ocp.CheckpointManager(tmp_path / "foreign") as manager:
        manager.save(1, args=ocp.args.StandardSave({"w": np.ones(2)}))
    with pytest.raises(UserError, match=r"it has no checkpoint.json, so it is not whole or not of evmamba-jax"):
        load_model(tmp_path / "foreign")
    (tmp_path / "model" / "0" / "model" / "_METADATA").unlink()
    with pytest.raises(UserError, match=r"checkpoint .*0 is damaged \(model/_METADATA is missing\)"):
        load_model(tmp_path / "model" / "0")


def test_save_model_refuses_an_occupied_folder(tmp_path):
    model = {"params": {"w": np.ones(2)}, "batch_stats": {}, "meta": {}}
    save_model(tmp_path, **model)
    with pytest.raises(UserError, match="already holds checkpoint 0"):
        save_model(tmp_path, **model)
