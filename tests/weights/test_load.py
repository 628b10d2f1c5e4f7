"""One door: a file, the folder it is converted to, a run and one of its checkpoints give the same by the same rules."""

import functools

import chex
import numpy as np
import pytest
from flax import nnx
from official_weights import save_pth, weights_of

from evmamba_jax import create_model
from evmamba_jax.arrays import merge, split
from evmamba_jax.checkpoints import Checkpoints, save_model
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model, build_model
from evmamba_jax.weights import from_torch, load_weights, open_model

SMALL = {
    "evmamba_t": {"width": 8, "depths": (1, 0, 1, 0), "d_state": 2},
    "vmamba_t": {"width": 8, "depths": (1, 0, 1, 0)},
    "msvmamba_n": {"width": 8, "depths": (1, 0, 1, 0)},
    "vim_t": {"width": 8, "depth": 1, "d_state": 2, "image_size": 64},
    "mambavision_t": {"width": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
}
PLACES = ("file.pth", "folder", "run", "run/checkpoints/7")


traced = functools.cache(abstract_model)  # once a module: tracing is all that these tests take


def small(name, **options):
    return merge(*split(traced(name, **SMALL[name] | options)))


def run_meta(name, step, **about):
    config = {"data": {"in_channels": 3}, "model": {"options": SMALL[name]}}
    return {"model": name, "num_classes": 5, "config": config, "step": step, **about}


@pytest.fixture(scope="module", params=SMALL)
def kept(request, tmp_path_factory):
    """Return a model's name, its weights, and a folder in which they lie in every place."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = small(name, num_classes=5)
    official = weights_of(model)
    from_torch(model, official)
    _, params, batch_stats = split(model)
    wrapped = {f"module.{key}": array for key, array in official.items()}
    half = {key: array / 2 for key, array in official.items()}
    save_pth(folder / "file.pth", {"model_ema": half, "model": wrapped, "epoch": 3})
    meta = {"model": name, "options": {**SMALL[name], "num_classes": 5}}
    save_model(folder / "folder", params=params, batch_stats=batch_stats, meta=meta)
    with Checkpoints(folder / "run" / "checkpoints") as checkpoints:
        items = {"model": {"params": params, "batch_stats": batch_stats}, "train": {"step": np.int32(7)}}
        checkpoints.save(7, items, meta=run_meta(name, 7))
    return name, model, folder


def test_every_place_gives_the_same(kept):
    name, filled, folder = kept
    _, params, batch_stats = split(filled)
    model = small(name, num_classes=5)
    for place in PLACES:
        found = load_weights(model, folder / place, name)
        chex.assert_trees_all_equal(found[:2], (params, batch_stats))
        assert all(isinstance(array, np.ndarray) for array in found.params.values())
        assert found.meta.get("model", name) == name
        assert not any(isinstance(array, np.ndarray) for array in split(model).params.values())  # it stays abstract

        if found.meta:  # a file says nothing of sizes that are not the published ones
            opened, *described = open_model(folder / place)
            chex.assert_trees_all_equal(split(opened)[1:], (params, batch_stats))
            assert described == [name, found.meta]


def test_another_number_of_classes_is_taken_by_who_trains_on_and_refused_otherwise(kept, caplog):
    name, filled, folder = kept
    _, params, batch_stats = split(filled)
    rest = {path: array for path, array in params.items() if not path.startswith("head.")}
    assert params.keys() - rest.keys() == {"head.kernel", "head.bias"}

    others, headless, fresh = (small(name, num_classes=count) for count in (3, 0, 3))
    from_torch(fresh, weights_of(fresh))
    head = {path: array for path, array in split(fresh).params.items() if path.startswith("head.")}
    for place in PLACES if name == "vim_t" else PLACES[:2]:  # what a folder is makes no difference from here on
        chex.assert_trees_all_equal(load_weights(headless, folder / place, name)[:2], (rest, batch_stats))
        assert not caplog.text
        found = load_weights(others, folder / place, name, initial=lambda: fresh)
        chex.assert_trees_all_equal(found[:2], (rest | head, batch_stats))
        assert f"{place} has 5 classes: the head of model {name}, with 3, starts anew" in caplog.text
        assert len(caplog.records) == 1
        caplog.clear()
        with pytest.raises(UserError, match=f"{place} has 5 classes and model {name} has 3; the two must be"):
            load_weights(others, folder / place, name)


def test_create_model_starts_a_new_head_from_any_place(tmp_path, caplog):
    """The head is the one that a model without weights would start with."""
    ours = small("evmamba_t", num_classes=5)
    from_torch(ours, weights_of(ours))
    _, params, batch_stats = split(ours)
    save_pth(tmp_path / "file.pth", weights_of(ours))
    save_model(tmp_path / "folder", params=params, batch_stats=batch_stats, meta={"model": "evmamba_t"})
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        items = {"model": {"params": params, "batch_stats": batch_stats}}
        checkpoints.save(7, items, meta=run_meta("evmamba_t", 7))

    options = SMALL["evmamba_t"] | {"num_classes": 3}
    fresh = split(build_model("evmamba_t", rngs=nnx.Rngs(4), **options)).params
    head = {path: array for path, array in fresh.items() if path.startswith("head.")}
    for count, place in enumerate(PLACES, start=1):
        model = create_model("evmamba_t", pretrained=tmp_path / place, rngs=nnx.Rngs(4), **options)
        assert caplog.text.count("starts anew") == count
        found = split(model).params
        chex.assert_trees_all_equal(found, params | head)
        chex.assert_trees_all_equal(split(model).batch_stats, batch_stats)


def test_weights_without_a_head_start_a_new_one(tmp_path, caplog):
    headless, model, fresh = (small("evmamba_t", num_classes=count) for count in (0, 3, 3))
    from_torch(headless, weights_of(headless))
    from_torch(fresh, weights_of(fresh))
    _, params, batch_stats = split(headless)
    save_pth(tmp_path / "file.pth", weights_of(headless))
    save_model(tmp_path / "folder", params=params, batch_stats=batch_stats, meta={})
    for place in ("file.pth", "folder"):
        found = load_weights(model, tmp_path / place, "evmamba_t", initial=lambda: fresh)
        chex.assert_trees_all_equal(found.params, split(fresh).params | params)
        assert f"{place} has no head: the head of model evmamba_t, with 3, starts anew" in caplog.text
        with pytest.raises(UserError, match=f"{place} does not fit model evmamba_t: .*head.*"):
            load_weights(model, tmp_path / place, "evmamba_t")


def test_vims_position_embedding_is_resized_for_who_trains_on_and_refused_otherwise(tmp_path, caplog):
    saved = small("vim_t", num_classes=5)
    from_torch(saved, weights_of(saved))
    _, params, batch_stats = split(saved)
    save_pth(tmp_path / "file.pth", weights_of(saved))
    save_model(tmp_path / "folder", params=params, batch_stats=batch_stats, meta={})
    other = small("vim_t", num_classes=5, image_size=32)
    found = []
    for place in ("file.pth", "folder"):
        found.append(load_weights(other, tmp_path / place, "vim_t", initial=lambda: other).params["pos_embed"])
        assert found[-1].shape == (1, 5, 8)
        assert caplog.text.count("position embedding resized from 4x4 to 2x2 patches") == len(found)
        with pytest.raises(UserError, match=f"{place} does not fit model vim_t: .*pos_embed"):
            load_weights(other, tmp_path / place, "vim_t")
    chex.assert_trees_all_equal(*found)


# Parameters or moving average: what a checkpoint's meta says, whether "better" takes the average, and the words for it.
EVALUATIONS = [
    ({"top1": 98.1, "ema_top1": 98.9}, 1, {}, True, ", moving average (top-1 98.9 against 98.1)"),
    ({"top1": 98.1, "ema_top1": 97.0}, 2, {}, False, ", parameters (top-1 98.1 against 97)"),
    ({"top1": 98.1, "ema_top1": 98.1}, 3, {}, False, ", parameters (top-1 98.1 against 98.1)"),
    ({"top1": 98.1, "ema_top1": 98.9}, 3, {}, False, ", parameters (not evaluated at this step)"),  # saved on SIGTERM
    ({"top1": 98.1}, 5, {}, False, ", parameters (not evaluated at this step)"),
    ({}, None, {}, False, ", parameters (not evaluated at this step)"),
    (
        {"top1": 9.0, "ema_top1": 1.0, "eval_loss": 2.5, "ema_eval_loss": 2.25},
        7,
        {"chooses": {"figure": "eval_loss", "higher": False}},
        True,
        ", moving average (eval loss 2.25 against 2.5)",
    ),
    (
        {"miou": float("nan"), "ema_miou": 0.5},
        8,
        {"chooses": {"figure": "miou", "higher": True}},
        True,
        ", moving average (miou 0.5 against nan)",
    ),
    (
        {"miou": 0.5, "ema_miou": float("nan")},
        9,
        {"chooses": {"figure": "miou", "higher": True}},
        False,
        ", parameters (miou 0.5 against nan)",
    ),
]


@pytest.fixture(scope="module")
def average(tmp_path_factory):
    """Return a run with a checkpoint for each of EVALUATIONS, whose parameters are 1 and their averages 2."""
    folder = tmp_path_factory.mktemp("run")
    _, *parts = split(small("evmamba_t", num_classes=5))
    items = {
        item: dict(
            zip(
                ("params", "batch_stats"),
                ({path: np.full(a.shape, value, np.float32) for path, a in part.items()} for part in parts),
                strict=True,
            )
        )
        for item, value in (("model", 1), ("ema", 2))
    }
    with Checkpoints(folder / "checkpoints", keep_last=len(EVALUATIONS)) as checkpoints:
        for step, (figures, evaluated, more, *_) in enumerate(EVALUATIONS, start=1):
            about = {"figures": figures, "evaluated": evaluated, "ema": True, **more}
            checkpoints.save(step, items, meta=run_meta("evmamba_t", step, **about))
    return folder


@pytest.mark.parametrize("step", range(1, len(EVALUATIONS) + 1))
def test_the_better_of_parameters_and_average_is_taken_and_named(average, step):
    *_, better, words = EVALUATIONS[step - 1]
    model, place = small("evmamba_t", num_classes=5), average / "checkpoints" / str(step)
    for ema, value, told in (
        ("better", 1 + better, words),
        (False, 1, ", parameters"),
        (True, 2, ", moving average"),
    ):
        found = load_weights(model, place, "evmamba_t", ema=ema)
        assert {float(array.mean()) for part in found[:2] for array in part.values()} == {value}
        assert found.taken == f"{place}{told}"


def test_every_door_takes_the_same_of_the_two(average):
    newest = average / "checkpoints" / str(len(EVALUATIONS))
    options = SMALL["evmamba_t"] | {"num_classes": 5}
    for ema, value in (("better", 1), (False, 1), (True, 2)):
        opened, _, _ = open_model(average, ema=ema)
        created = create_model("evmamba_t", pretrained=average, ema=ema, **options)
        for model in (opened, created):
            assert float(model.head.bias[...].mean()) == value
    assert load_weights(opened, f"{average}/", "evmamba_t").place == str(newest)
    with pytest.raises(UserError, match="ema is 'best'; allowed: True, False or 'better'"):
        create_model("evmamba_t", pretrained=average, ema="best", **options)


def test_the_average_of_an_official_file_is_an_entry_of_it(tmp_path):
    model = small("evmamba_t", num_classes=5)
    official = weights_of(model)
    half = {key: array / 2 for key, array in official.items()}
    save_pth(tmp_path / "both.pth", {"model": official, "model_ema": half})
    save_pth(tmp_path / "one.pth", {"model": official})
    save_pth(tmp_path / "bare.pth", official)
    own, average = (load_weights(model, tmp_path / "both.pth", "evmamba_t", ema=ema) for ema in ("better", True))
    chex.assert_trees_all_equal(average.params, {path: array / 2 for path, array in own.params.items()})
    assert own.taken == f"{tmp_path}/both.pth, entry 'model'"
    assert average.taken == f"{tmp_path}/both.pth, entry 'model_ema'"
    assert load_weights(model, tmp_path / "bare.pth", "evmamba_t").taken == f"{tmp_path}/bare.pth"
    with pytest.raises(UserError, match=r"one.pth' has no moving average \(no entry 'model_ema', .* 'model'$"):
        load_weights(model, tmp_path / "one.pth", "evmamba_t", ema=True)


def test_a_folder_without_an_average_is_refused_when_asked_for_it(kept):
    name, _, folder = kept
    for place in ("folder", "run"):
        with pytest.raises(UserError, match="has no moving average .EMA.; read the parameters themselves"):
            load_weights(small(name, num_classes=5), folder / place, name, ema=True)
        assert "," not in load_weights(small(name, num_classes=5), folder / place, name, ema=False).part


def test_a_folder_that_names_no_model_needs_a_name_but_its_classes_are_counted(tmp_path):
    model = small("evmamba_t", num_classes=5)
    from_torch(model, weights_of(model))
    _, params, batch_stats = split(model)
    meta = {"options": SMALL["evmamba_t"]}
    save_model(tmp_path / "folder", params=params, batch_stats=batch_stats, meta=meta)
    with pytest.raises(UserError, match="folder does not say which model it is of; name it, e.g. --model evmamba_t"):
        open_model(tmp_path / "folder")
    opened, _, _ = open_model(tmp_path / "folder", "evmamba_t")
    chex.assert_trees_all_equal(split(opened).params, params)
    with pytest.raises(UserError, match="checkpoint .*folder does not fit model vmamba_t: "):
        open_model(tmp_path / "folder", "vmamba_t")
