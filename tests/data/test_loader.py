"""The loader: the step number is the whole state, for any number of hosts, threads and workers."""

import dataclasses

import chex
import numpy as np
import pytest

from evmamba_jax.data.loader import eval_batches, train_batches
from evmamba_jax.data.sources import open_source
from evmamba_jax.errors import UserError


def take(config, source, steps: int, processes: int = 1, **settings) -> list[dict[str, np.ndarray]]:
    """Read global batches: what the processes got, put together in their order."""
    parts = []
    for index in range(processes):
        with train_batches(config, source, process_index=index, process_count=processes, **settings) as batches:
            parts.append([next(batches) for _ in range(steps)])
    return [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]


@pytest.fixture
def digits(digits_dir, small):
    config = dataclasses.replace(small, name="digits", data_dir=str(digits_dir), image_size=12, crop_pct=0.75)
    return config, open_source(config, "train")


def test_batches_have_the_promised_shapes(digits):
    config, source = digits
    (batch,) = take(config, source, 1, seed=0, global_batch=6)
    chex.assert_shape(batch["image"], (6, 12, 12, 1))
    assert {key: value.dtype.name for key, value in batch.items()} == {
        "image": "uint8",
        "label": "int32",
        "corrupt": "int32",
    }


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batches_do_not_depend_on_the_processes(digits, processes):
    config, source = digits
    settings = {"seed": 11, "global_batch": 512}  # 1437 examples: the third step crosses the end of the epoch
    chex.assert_trees_all_equal(take(config, source, 4, **settings), take(config, source, 4, processes, **settings))


def test_worker_processes_change_nothing(digits):
    config, source = digits
    settings = {"seed": 11, "global_batch": 8, "start_step": 178}  # 179 * 8 = 1432: the next step ends the epoch
    expected = take(config, source, 4, **settings)
    chex.assert_trees_all_equal(take(dataclasses.replace(config, num_workers=2), source, 4, **settings), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(digits, threads):
    config, source = digits
    expected = take(config, source, 3, seed=0, global_batch=16)
    got = take(dataclasses.replace(config, num_threads=threads), source, 3, seed=0, global_batch=16)
    chex.assert_trees_all_equal(got, expected)


def test_every_start_step_continues_the_same_run(numbered, small):
    source = numbered(10)
    run = take(small, source, 9, seed=4, global_batch=4)  # 36 examples: epochs end inside steps 2, 5 and 7
    for start in range(9):
        chex.assert_trees_all_equal(
            take(small, source, 9 - start, seed=4, global_batch=4, start_step=start), run[start:]
        )


def test_the_step_alone_determines_padded_crops(digits):
    config, source = digits
    config = dataclasses.replace(config, pad_crop=3)
    settings = {"seed": 4, "global_batch": 8}
    run = take(config, source, 4, **settings)
    chex.assert_trees_all_equal(take(config, source, 2, 2, start_step=2, **settings), run[2:])
    workers = dataclasses.replace(config, num_workers=1)
    chex.assert_trees_all_equal(take(workers, source, 1, start_step=3, **settings), run[3:])
    other = take(config, source, 4, **settings | {"seed": 5})
    assert any((one["image"] != two["image"]).any() for one, two in zip(run, other, strict=True))


def test_far_steps_are_reached_at_once(numbered, small):
    chex.assert_trees_all_equal(
        take(small, numbered(10), 1, seed=4, global_batch=4, start_step=10**9),
        take(small, numbered(10), 1, 2, seed=4, global_batch=4, start_step=10**9),
    )


def test_each_epoch_shows_every_example_once_in_its_own_order(numbered, small):
    source = numbered(10)
    labels = np.concatenate([batch["label"] for batch in take(small, source, 10, seed=0, global_batch=4)]).reshape(
        4, 10
    )
    assert (np.sort(labels) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in labels}) == 4
    other = np.concatenate([batch["label"] for batch in take(small, source, 10, seed=1, global_batch=4)])
    assert (labels.ravel() != other).any()


def test_each_epoch_augments_anew(digits):
    """Each example is seen three times and cropped differently each time."""
    config, source = digits
    seen = {}
    with train_batches(config, source, seed=0, global_batch=1437) as batches:
        for _ in range(2):
            batch = next(batches)
            for image, label in zip(batch["image"], batch["label"], strict=True):
                seen.setdefault(int(label), set()).add(image.tobytes())
    assert sum(map(len, seen.values())) > 2 * 1437 * 0.97


def test_images_are_those_of_their_labels(numbered, small):
    for batch in take(small, numbered(10), 5, seed=0, global_batch=4):
        assert (batch["image"] == batch["label"][:, None, None, None]).all()


def test_a_data_set_smaller_than_a_batch_is_repeated(numbered, small):
    (batch,) = take(small, numbered(3), 1, seed=0, global_batch=8)
    assert sorted(np.bincount(batch["label"])) == [2, 3, 3]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(("examples", "global_batch"), [(10, 4), (8, 4), (5, 16)])
def test_evaluation_counts_every_example_once(numbered, small, processes, examples, global_batch):
    seen, lengths = [], set()
    for index in range(processes):
        settings = {"global_batch": global_batch, "process_index": index, "process_count": processes}
        with eval_batches(small, numbered(examples), **settings) as batches:
            got = list(batches)
        lengths.add(len(got))
        for batch in got:
            chex.assert_shape(batch["image"], (global_batch // processes, 8, 8, 1))
            assert batch["weight"].dtype == np.float32
            assert batch["index"].dtype == batch["label"].dtype == np.int32
            counted = batch["weight"] == 1
            assert (batch["weight"][~counted] == 0).all()
            assert (batch["index"][~counted] == -1).all()
            assert (batch["label"][counted] == batch["index"][counted]).all()
            assert (batch["image"][counted] == batch["label"][counted][:, None, None, None]).all()
            seen += batch["index"][counted].tolist()
    assert sorted(seen) == list(range(examples))
    assert lengths == {-(-examples // global_batch)}


def test_evaluation_is_in_order(numbered, small):
    with eval_batches(small, numbered(6), global_batch=4) as batches:
        assert np.concatenate([batch["index"] for batch in batches]).tolist() == [0, 1, 2, 3, 4, 5, -1, -1]


def test_a_corrupt_image_stops_and_is_named(numbered, small):
    source = numbered(10, corrupt=(7,))
    with train_batches(small, source, seed=0, global_batch=10) as batches, pytest.raises(UserError) as caught:
        next(batches)
    message = str(caught.value)
    assert "number_7.png" in message
    assert "on_corrupt=skip" in message
    assert "\n" not in message
    with eval_batches(small, source, global_batch=10) as batches, pytest.raises(UserError, match=r"number_7\.png"):
        next(batches)


def test_corrupt_images_are_replaced_and_counted(numbered, small):
    config = dataclasses.replace(small, on_corrupt="skip")
    source = numbered(10, corrupt=(3, 4, 9))
    (batch,) = take(config, source, 1, seed=0, global_batch=10)
    # 3 and 4 become 5, 9 becomes 0: the next readable record, around the end.
    assert sorted(batch["label"]) == [0, 0, 1, 2, 5, 5, 5, 6, 7, 8]
    assert sorted(batch["corrupt"][batch["label"] == 5]) == [0, 1, 2]
    assert batch["corrupt"].sum() == 4
    chex.assert_trees_all_equal(batch, take(config, source, 1, 2, seed=0, global_batch=10)[0])


def test_corrupt_images_weigh_nothing_in_evaluation(numbered, small):
    config = dataclasses.replace(small, on_corrupt="skip")
    with eval_batches(config, numbered(6, corrupt=(1, 4)), global_batch=8) as batches:
        (batch,) = batches
    assert batch["weight"].tolist() == [1, 0, 1, 1, 0, 1, 0, 0]
    assert batch["corrupt"].tolist() == [0, 1, 0, 0, 1, 0, 0, 0]
    assert batch["index"].tolist() == [0, 1, 2, 3, 4, 5, -1, -1]


def test_nothing_readable_is_an_error_even_when_skipping(numbered, small):
    config = dataclasses.replace(small, on_corrupt="skip")
    batches = train_batches(config, numbered(3, corrupt=(0, 1, 2)), seed=0, global_batch=2)
    with batches, pytest.raises(UserError, match="not one image"):
        next(batches)


def test_a_worker_names_the_corrupt_image_too(digits, small):
    config, source = digits
    records = [source.records[i] for i in range(4)]
    broken = dataclasses.replace(source, records=[record.replace(b"IDAT", b"OOPS") for record in records])
    batches = train_batches(dataclasses.replace(config, num_workers=1), broken, seed=0, global_batch=2)
    with batches, pytest.raises(UserError, match=r"corrupt image in digits:1.0.0, split train: train\[\d\]: "):
        next(batches)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_batch": 6, "process_count": 4}, "global batch 6 cannot be shared by 4 processes"),
        ({"global_batch": 0}, "global batch 0"),
        ({"global_batch": 20, "process_count": 20}, "20 processes are more than the 10 examples of numbers"),
        ({"global_batch": 4, "process_index": 2, "process_count": 2}, "process_index=2"),
        ({"global_batch": 4, "seed": -1}, "seed=-1"),
    ],
)
def test_impossible_settings_are_refused(numbered, small, settings, message):
    with pytest.raises(UserError, match=message):
        train_batches(small, numbered(10), **({"seed": 0} | settings))
    if "seed" not in settings:
        with pytest.raises(UserError, match=message):
            eval_batches(small, numbered(10), **settings)
