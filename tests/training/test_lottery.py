"""Iterative pruning: each level's masks and start by a slow count, controls, barriers, and a run killed everywhere."""

import dataclasses
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import get_config

from evmamba_jax.arrays import Variables, merge, split
from evmamba_jax.checkpoints import Checkpoints, find, load_model
from evmamba_jax.data.sources import prepare
from evmamba_jax.errors import UserError
from evmamba_jax.pruning import prunable
from evmamba_jax.reports.tickets import read_tickets
from evmamba_jax.tasks import task_of
from evmamba_jax.training import barrier, loop, lottery, run
from evmamba_jax.training import mesh as meshes
from evmamba_jax.training.config import Duration
from evmamba_jax.training.evaluator import Evaluator
from evmamba_jax.training.setup import Setup


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare("digits", folder)
    config = get_config("convolutions")
    config.data.data_dir = str(folder)
    config.pruning.method, config.pruning.scope, config.pruning.levels = "imp", "global", 2
    config.pruning.rate, config.pruning.rewind = 0.3, Duration(steps=3)
    config.duration, config.optim.warmup = Duration(steps=8), Duration(steps=2)
    config.log_every, config.eval_every, config.save_every = Duration(steps=2), Duration(steps=8), Duration(steps=5)
    config.keep_last = 3
    return config


@pytest.fixture(scope="module", autouse=True)
def light():
    """Let all runs share one compiled step, draw nothing, and measure short lines."""
    programs, one_device = {}, meshes.make_mesh

    def compiled(setup):
        if "step" not in programs:
            programs["step"] = setup.lower().compile()
        return programs["step"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Setup, "compiled", property(compiled))
        patch.setattr(loop, "_draw", lambda *_: None)
        patch.setattr(loop, "_write_sparsity", lambda *_: None)
        patch.setattr(barrier, "POINTS", 3)
        patch.setattr(barrier, "BATCHES", 1)
        patch.setattr(meshes, "make_mesh", lambda config: one_device(config, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """Return the work folder of a run with both controls."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    asked = dataclasses.replace(config, pruning=dataclasses.replace(config.pruning, controls=("random", "reinit")))
    run(asked, workdir)
    return workdir


def everything(folder):
    """Return the arrays of the checkpoint in a folder of one step, or of the newest."""
    found = find(folder)
    return found.read()[0] | {f"ema {name}": array for name, array in found.read(ema=True)[0].items()}


def parts(config):
    """Return what a lottery is made of."""
    task = task_of(config)
    source, test = (task.open_source(config, split) for split in ("train", "test"))
    evaluator = Evaluator(task(config, source.class_names), meshes.make_mesh(config), test)
    return evaluator, Setup(evaluator.task, evaluator.mesh, len(source)), source


def alive(params, names):
    return np.concatenate([np.asarray(params[name]).ravel() != 0 for name in names])


def test_each_level_prunes_the_least_of_what_is_left(whole):
    dense, _, _ = load_model(whole / "level_0")
    names = sorted(prunable(dense))
    left = np.ones(sum(dense[name].size for name in names), bool)
    for level in (1, 2):
        before, _, _ = load_model(whole / f"level_{level - 1}")
        size = np.abs(np.concatenate([before[name].ravel() for name in names]))
        order = [k for k in np.argsort(size, kind="stable") if left[k]]
        left[order[: round(0.3 * left.sum())]] = False
        params, _, _ = load_model(whole / f"level_{level}")
        np.testing.assert_array_equal(alive(params, names), left)


def test_a_level_starts_from_the_dense_ones_early_state(whole):
    early, first = (everything(whole / name / "checkpoints" / "3") for name in ("level_0", "level_1"))
    params, _, _ = load_model(whole / "level_1")
    kept = {name: params[name] != 0 for name in prunable(params)}
    for name, array in early.items():
        own = name.removeprefix("ema ")
        np.testing.assert_array_equal(first[name], array * kept[own] if own in kept else array, err_msg=name)


def test_controls_have_as_many_weights(whole):
    ticket, random, other = (load_model(whole / f"level_2{name}")[0] for name in ("", "_random", "_reinit"))
    names = prunable(ticket)
    for name in names:
        assert (random[name] != 0).sum() == (ticket[name] != 0).sum()
        np.testing.assert_array_equal(other[name] != 0, ticket[name] != 0)
    assert (alive(random, names) != alive(ticket, names)).mean() > 0.2
    fresh, early = (load_model(whole / name / "checkpoints")[2]["step"] for name in ("level_2_reinit", "level_2"))
    assert fresh == early == 8
    with Checkpoints(whole / "level_2_reinit" / "checkpoints") as checkpoints:
        assert checkpoints.steps()[0] == 0


def test_the_table_says_what_each_level_found(whole):
    tickets = read_tickets(whole)
    assert [(t.level, t.control) for t in tickets] == [
        *((0, ""), (1, ""), (1, "random"), (1, "reinit"), (2, ""), (2, "random"), (2, "reinit"))
    ]
    assert [t.density for t in tickets[::3]] == pytest.approx([1, 0.7, 0.49], abs=1e-3)
    for ticket, folder in zip(tickets, ("level_0", "level_1", "level_1_random"), strict=False):
        figures = find(whole / folder).meta["figures"]
        assert ticket.figure == max(figures["top1"], figures["ema_top1"])
    assert [np.isnan(t.barrier) for t in tickets] == [True, False, True, True, False, True, True]
    assert (whole / "tickets.png").is_file()
    assert (whole / "tickets.csv").read_text().splitlines()[0] == "level,control,density,top1,barrier"


def test_a_barrier_by_statistics_of_a_whole_batch(config, whole):
    """The model itself in training mode, one batch; its statistics solved from what it says after it."""
    evaluator, setup, source = parts(config)
    a, b = (Variables(*load_model(whole / f"level_{level}")[:2]) for level in (1, 2))
    b = Variables({name: array[::-1] for name, array in b.params.items()}, b.batch_stats)  # far away
    found = barrier.Line(evaluator, setup, source).barrier(a, b)

    with setup.batches(source, 0) as batches:
        batch = jax.tree.map(np.asarray, next(batches))
    losses = []
    for share in (0, 0.5, 1):
        mixed = jax.tree.map(lambda x, y, s=share: jnp.asarray((1 - s) * x + s * y), a, b)
        model = merge(split(evaluator.task.model).graphdef, mixed.params, mixed.batch_stats)
        model.train()
        input_key, key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
        evaluator.task.loss(model, evaluator.task.inputs(input_key, batch), key, None)
        after = split(model).batch_stats
        own = {name: (after[name] - 0.9 * mixed.batch_stats[name]) / 0.1 for name in after}
        losses.append(evaluator(Variables(mixed.params, own), None).figures["eval_loss"])
    assert found == pytest.approx(losses[1] - (losses[0] + losses[2]) / 2, rel=1e-3, abs=1e-4)


def test_a_run_killed_at_every_save_goes_on_to_the_bit(config, whole, tmp_path):
    """Each life ends at its first save, before or after it: between levels, at a rewind, within a level."""

    class Killed(BaseException):
        pass

    save, lives, late = Checkpoints.save, [0], [False]

    def dying(self, step, items, **about):
        if step != self._current:
            if late[0]:
                save(self, step, items, **about)
                self.wait()
            lives[0] += 1
            raise Killed
        save(self, step, items, **about)

    workdir = tmp_path / "run"
    config = dataclasses.replace(config, pruning=dataclasses.replace(config.pruning, levels=1))
    for late[0] in (False, True, True, True, False, True, True):
        with mock.patch.object(Checkpoints, "save", dying), pytest.raises(Killed):
            run(config, workdir)
    figures = run(config, workdir)
    assert lives[0] == 7
    assert figures == find(whole / "level_1").meta["figures"]
    for level in ("level_0", "level_1"):
        assert (workdir / level / "metrics.jsonl").read_bytes() == (whole / level / "metrics.jsonl").read_bytes()
        a, b = everything(whole / level), everything(workdir / level)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert read_tickets(workdir)[1].barrier == read_tickets(whole)[1].barrier


def test_weights_of_the_level_before_can_go_on(config, whole):
    asked = dataclasses.replace(config, pruning=dataclasses.replace(config.pruning, reset="final"))
    levels = lottery.Lottery(*parts(asked), whole)
    state = jax.device_get(levels.first(lottery.Level(2)))
    late, ticket = everything(whole / "level_1"), load_model(whole / "level_2")[0]
    for name, array in late.items():
        own = name.removeprefix("ema ")
        found = (state.ema if name != own else state.model).params[own]
        kept = ticket[own] != 0 if own in prunable(ticket) else np.ones(array.shape, bool)
        np.testing.assert_array_equal(found, array * kept, err_msg=name)
    assert state.step == 3


def test_the_log_counts_all_levels(whole):
    rows = [json.loads(line) for line in (whole / "level_1" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 4  # the window goes on that was open at step 3
    assert rows[0]["sparsity"] == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewind": Duration(steps=8)}, "rewind is step 8, and the run has 8: rewind to an earlier one"),
        ({"factors": ("head.kernel=0",)}, "prunes a share of what is left at each level: leave factors"),
        ({"controls": ("reint",)}, "controls=.*allowed"),
    ],
)
def test_mistakes_get_one_line(config, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(dataclasses.replace(config, pruning=dataclasses.replace(config.pruning, **changes)), tmp_path)


def test_a_folder_of_levels_is_no_checkpoint(whole):
    with pytest.raises(UserError, match="there are runs in it, name one: level_0, level_1, level_1_random"):
        find(whole)
