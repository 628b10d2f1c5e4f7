"""Evaluations alone: exact counts by class, official files as they are, and mistakes told in one line."""

import contextlib
import csv
import dataclasses
import io
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import TINY, environment, run
from official_weights import save_pth, weights_of
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2
from tiny import get_config

from evmamba_jax import training
from evmamba_jax.arrays import Variables, split
from evmamba_jax.checkpoints import Checkpoints
from evmamba_jax.data.builders import Digits
from evmamba_jax.data.sources import Source, prepare
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model
from evmamba_jax.reports.per_class import Counts, write_per_class
from evmamba_jax.tasks import task_of
from evmamba_jax.training import mesh as meshes
from evmamba_jax.training.evaluator import Evaluator
from evmamba_jax.training.setup import Setup
from evmamba_jax.weights import from_torch
from train_tpu import main

VARIANT = ":convolutions"


# Weights by the rule


def abstract(**changes):
    """Return the model of tiny.py, its arrays of shapes only."""
    config = get_config("convolutions").model
    return abstract_model(config.name, **{"num_classes": 10, "in_channels": 1, **config.options, **changes})


def filled():
    """Return it with weights by the rule."""
    model = abstract()
    from_torch(model, weights_of(model))
    return model


def task_for(config):
    return task_of(config)(config, [str(k) for k in range(10)])


# Counting


def evaluator_of(config, source):
    mesh = meshes.make_mesh(config)
    return Evaluator(task_of(config)(config, source.class_names), mesh, source)


def variables_of(model, mesh):
    return jax.device_put(Variables(*split(model)[1:]), meshes.replicated(mesh))


def record(image: bytes, label: int) -> bytes:
    proto = tf_example_pb2.Example()
    proto.features.feature["image"].bytes_list.value.append(image)
    proto.features.feature["label"].int64_list.value.append(label)
    return proto.SerializeToString()


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("fsdp", [1, 4])
def test_padding_and_unreadable_images_do_not_count(fsdp):
    """45 images in batches of 32 on eight devices, three of them cut short, against a loop over single images."""
    rng = np.random.default_rng(1)
    pixels, labels = rng.integers(0, 256, (45, 8, 8), dtype=np.uint8), rng.integers(0, 10, 45)
    cut = (0, 31, 44)
    records = [record(png(image)[: 40 if i in cut else None], labels[i]) for i, image in enumerate(pixels)]
    source = Source("numbers", "all", tuple(f"class {k}" for k in range(10)), records)

    config = get_config("convolutions")
    config.data.on_corrupt, config.mesh.fsdp = "skip", fsdp
    evaluator, model = evaluator_of(config, source), filled()
    variables = variables_of(model, evaluator.mesh)
    figures, sums, best, _ = evaluator(variables, None, detailed=True)
    assert best == "model"
    assert (figures["examples"], figures["eval_corrupt"]) == (42, 3)

    counts = sums["model"]["by_class"]
    forward = jax.jit(model.__call__)
    expected, top5 = np.zeros((10, 10), int), np.zeros(10, int)
    for i, image in enumerate(pixels):
        if i not in cut:
            scores = np.asarray(forward(jnp.float32((image / 255 - 0.3) / 0.38)[None, :, :, None]))[0]
            order = sorted(range(10), key=lambda k: -scores[k])
            expected[labels[i], order[0]] += 1
            top5[labels[i]] += labels[i] in order[:5]
    np.testing.assert_array_equal(counts.confusion, expected)
    np.testing.assert_array_equal(counts.top1, expected.diagonal())
    np.testing.assert_array_equal(counts.top5, top5)
    assert figures["top1"] == pytest.approx(100 * expected.trace() / 42)

    # Models that name one class, the most frequent or the rarest: whichever is the average, the better is found.
    times = np.bincount(np.delete(labels, cut), minlength=10)
    frequent, rarest = (one_class(variables, k) for k in (times.argmax(), times.argmin()))
    for pair, best in (((frequent, rarest), "model"), ((rarest, frequent), "ema"), ((rarest, rarest), "model")):
        assert evaluator(*pair, detailed=True).best == best


def one_class(variables: Variables, k: int) -> Variables:
    bias = jnp.zeros_like(variables.params["head.bias"]).at[k].set(1e3)
    return dataclasses.replace(variables, params=variables.params | {"head.bias": bias})


def test_an_evaluation_without_a_readable_image_says_so():
    records = [record(png(np.zeros((8, 8), np.uint8))[:40], 0)] * 3
    source = Source("numbers", "all", tuple(map(str, range(10))), records)
    config = get_config("convolutions")
    config.data.on_corrupt = "skip"
    evaluator = evaluator_of(config, source)
    with pytest.raises(UserError, match=r"not one of the 3 images of numbers, split all, can be read"):
        evaluator(variables_of(filled(), evaluator.mesh), None)


def test_per_class_lines(tmp_path):
    confusion = np.array([[1, 0, 2], [0, 3, 0], [0, 0, 0]])
    model = Counts(confusion, confusion.diagonal(), np.array([2, 3, 0]))
    ema = Counts(np.array([[3, 0, 0], [1, 2, 0], [0, 0, 0]]), np.array([3, 2, 0]), np.array([3, 3, 0]))
    names = ["tench, Tinca tinca", 'a "quoted" fish', "crane"]
    write_per_class(tmp_path, {"model": model}, names)
    assert (tmp_path / "per_class.csv").read_text() == (
        "class,name,images,top1,top5,taken_for,taken_for_name,taken_for_share\n"
        '0,"tench, Tinca tinca",3,33.33,66.67,2,crane,66.67\n'
        '1,"a ""quoted"" fish",3,100.00,100.00,,,\n'
        "2,crane,0,,,,,\n"
    )
    write_per_class(tmp_path, {"model": model, "ema": ema}, names)
    with (tmp_path / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["top1"] for row in rows] == ["33.33", "100.00", ""]
    assert [row["ema_top1"] for row in rows] == ["100.00", "66.67", ""]
    assert [row["ema_taken_for_name"] for row in rows] == ["", "tench, Tinca tinca", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["per_class.csv"]


# Official files


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare("digits", folder)
    return folder


@pytest.fixture(scope="module")
def pth(tmp_path_factory):
    """Return a file as the official training code leaves it, with an average beside the weights."""
    path = tmp_path_factory.mktemp("official") / "tiny.pth"
    own = weights_of(abstract())
    save_pth(path, {"model_ema": {name: array / 2 for name, array in own.items()}, "model": own, "epoch": 3})
    return path


def test_an_official_file_is_evaluated_as_it_is(data_dir, pth, tmp_path):
    """As its user does it, on four devices; the digits are counted again one by one."""
    env = environment(devices=4, TFDS_DATA_DIR=str(data_dir))
    arguments = ("--config.eval_only=True", f"--config.init_from={pth}", "--config.confusion=True")
    code, out, err = run(*arguments, "--workdir", tmp_path / "run", config=TINY + VARIANT, env=env)
    assert code == 0, out + err
    assert f"weights: {pth}, entry 'model'\n" in out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"per_class.csv", "confusion.png"}

    builder = Digits(data_dir=data_dir, file_format="array_record")
    examples = list(builder._split_generators(None)["test"])
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(example["image"]))) for _, example in examples])
    labels = np.array([example["label"] for _, example in examples])
    scores = np.asarray(jax.jit(filled().__call__)(jnp.float32((pixels / 255 - 0.3) / 0.38)[..., None]))
    order = np.argsort(-scores, axis=1)
    assert len(set(order[:, 0])) > 3  # the weights tell something apart
    with (tmp_path / "run" / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for k, row in enumerate(rows):
        own = order[labels == k]
        wrong = [int(guess) for guess in own[:, 0] if guess != k]
        most = max(range(10), key=lambda j: (wrong.count(j), -j))
        assert row == {
            "class": str(k),
            "name": str(k),
            "images": str(len(own)),
            "top1": f"{100 * (own[:, 0] == k).sum() / len(own):.2f}",
            "top5": f"{100 * (own[:, :5] == k).sum() / len(own):.2f}",
            "taken_for": str(most) if wrong else "",
            "taken_for_name": str(most) if wrong else "",
            "taken_for_share": f"{100 * wrong.count(most) / len(own):.2f}" if wrong else "",
        }
    top1 = 100 * np.mean(order[:, 0] == labels)
    top5 = 100 * np.mean((order[:, :5] == labels[:, None]).any(1))
    assert f"evmamba_t of {pth} on digits: top-1 {top1:.2f} %, top-5 {top5:.2f} % (360 images)" in out


def test_an_evaluation_of_a_run_takes_both_sets_of_weights_and_says_so(data_dir, tmp_path, capsys):
    _, params, batch_stats = split(filled())
    item = {"params": params, "batch_stats": batch_stats}
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(7, {"model": item, "ema": item}, meta={"model": "evmamba_t", "ema": True})
    argv = ["train_tpu.py", "--config", TINY + VARIANT, "--workdir", str(tmp_path / "out")]
    more = ("--config.eval_only=True", f"--config.init_from={tmp_path / 'run'}", f"--config.data.data_dir={data_dir}")
    assert main([*argv, *more]) == 0
    weights, told = capsys.readouterr().out.splitlines()
    assert weights == f"weights: {tmp_path}/run/checkpoints/7, parameters and moving average"
    own, average = re.findall(r"top-1 (\S+) %", told)
    assert own == average


def test_training_starts_from_an_official_file(data_dir, pth):
    config = get_config("convolutions")
    config.data.data_dir, config.init_from, config.mesh.fsdp = str(data_dir), str(pth), 2
    state = Setup(task_for(config), meshes.make_mesh(config), 1437).first_state()
    _, params, batch_stats = split(filled())
    for part in (state.model, state.ema):
        chex.assert_trees_all_equal(jax.device_get(part), Variables(params, batch_stats))
    np.testing.assert_array_equal(params["head.kernel"], weights_of(abstract())["classifier.head.weight"].T)
    assert int(state.step) == 0


def test_training_for_other_classes_starts_with_a_new_head(data_dir, tmp_path, caplog):
    save_pth(tmp_path / "weights.pth", weights_of(abstract(num_classes=1000)))
    config = get_config("convolutions")
    config.data.data_dir, config.init_from, config.seed = str(data_dir), str(tmp_path / "weights.pth"), 5
    task = task_for(config)
    state = Setup(task, meshes.make_mesh(config), 1437).first_state()
    expected = weights_of(abstract(num_classes=1000))
    for part in (state.model, state.ema):
        params = jax.device_get(part.params)
        assert params.keys() == split(task.model).params.keys()
        np.testing.assert_array_equal(params["norm.scale"], expected["classifier.norm.weight"])
        initial = split(task.build_model()).params
        for path in ("head.kernel", "head.bias"):
            np.testing.assert_allclose(params[path], initial[path], rtol=1e-5)
    assert "weights.pth has 1000 classes: the head of model evmamba_t for digits, with 10, starts anew" in caplog.text


def test_training_goes_on_from_vims_file_of_another_grid_but_no_evaluation_does(data_dir, tmp_path, caplog):
    small = {"width": 8, "depth": 1, "d_state": 2, "num_classes": 10, "in_channels": 1}
    given = abstract_model("vim_t", **small, image_size=64)
    save_pth(tmp_path / "vim.pth", weights_of(given))

    config = get_config("convolutions")
    options = {name: size for name, size in small.items() if name not in ("num_classes", "in_channels")}
    config.model = dataclasses.replace(config.model, name="vim_t", options={**options, "image_size": 32})
    config.data.data_dir, config.data.image_size = str(data_dir), 32
    task = task_for(config)
    found = task.load(tmp_path / "vim.pth")
    assert found.params["pos_embed"].shape == (1, 2 * 2 + 1, 8)
    assert "position embedding resized from 4x4 to 2x2 patches" in caplog.text
    assert found.meta == {}
    config.eval_only = True
    with pytest.raises(UserError, match=r"vim\.pth does not fit model vim_t for digits: .*'pos_embed' is \(1, 17, 8\)"):
        task.load(tmp_path / "vim.pth")


# Mistakes


def refused(data_dir, workdir, *arguments) -> str:
    """Run the command in this process, check that it is refused as it should be, and return the line."""
    err = io.StringIO()
    argv = ["train_tpu.py", "--config", TINY + VARIANT, "--workdir", str(workdir)]
    with contextlib.redirect_stderr(err):
        code = main([*argv, f"--config.data.data_dir={data_dir}", *arguments])
    assert code == 2
    (line,) = err.getvalue().splitlines()
    assert not [path for path in workdir.rglob("*") if path.is_file()]
    return line


def test_an_evaluation_refuses_weights_for_other_classes(data_dir, tmp_path):
    save_pth(tmp_path / "weights.pth", weights_of(abstract(num_classes=1000)))
    arguments = ("--config.eval_only=True", f"--config.init_from={tmp_path / 'weights.pth'}")
    line = refused(data_dir, tmp_path / "run", *arguments)
    assert "weights.pth has 1000 classes and model evmamba_t for digits has 10; the two must be the same" in line


@pytest.mark.parametrize("alone", [True, False], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "weights.pth' does not exist; give a file of official weights (.pth, .pth.tar, .ckpt, .bin, .safetens"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "weights.pth' is no weight file: it starts with"),
        (
            {"width": 16},
            "weights.pth does not fit model evmamba_t for digits: the weights do not fit EfficientVMamba (",
        ),
        ({"foreign": True}, "; 2 unexpected: 'conv1.weight', 'fc.bias'); take the variant"),
    ],
    ids=["missing", "foreign file", "other size", "another model"],
)
def test_weights_that_will_not_do_are_named(data_dir, tmp_path, content, message, alone):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == {"foreign": True}:
        save_pth(path, {"conv1.weight": np.zeros((64, 3, 7, 7), np.float32), "fc.bias": np.zeros(10, np.float32)})
    elif content is not None:
        save_pth(path, {"model": weights_of(abstract(**content))})
    flags = ["--config.eval_only=True"] if alone else []
    line = refused(data_dir, tmp_path / "run", f"--config.init_from={path}", *flags)
    assert message in line


def test_a_work_folder_without_a_run_cannot_be_evaluated(data_dir, tmp_path):
    line = refused(data_dir, tmp_path / "run", "--config.eval_only=True")
    assert f"there is no run in {tmp_path / 'run'} to evaluate; name its --workdir, or set --config.init_from" in line


def test_a_confusion_picture_needs_an_evaluation(data_dir, tmp_path):
    line = refused(data_dir, tmp_path / "run", "--config.confusion=True")
    assert "config.confusion draws what an evaluation counts; add --config.eval_only=True" in line


def test_an_unwritable_work_folder_is_found_out_before_the_evaluation(data_dir, pth, tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluator, "__call__", lambda *_, **__: pytest.fail("evaluated first"))
    (tmp_path / "file").write_text("")
    config = get_config("convolutions")
    config.data.data_dir, config.init_from, config.eval_only = str(data_dir), str(pth), True
    with pytest.raises(UserError, match=r"cannot write in .*file/run \(Not a directory\)"):
        training.run(config, Path(tmp_path / "file" / "run"))
