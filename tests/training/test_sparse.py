"""Runs that prune: exact zeros after every step, drawings that a resumed run repeats, mistakes in one line."""

import csv
import functools
import json

import command
import jax
import numpy as np
import pytest
from command import TINY
from tiny import get_config

from evmamba_jax import pruning
from evmamba_jax.arrays import merge, split
from evmamba_jax.checkpoints import Checkpoints, load_model
from evmamba_jax.data.sources import prepare
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model
from evmamba_jax.pruning import prunable
from evmamba_jax.tasks import Moment, task_of
from evmamba_jax.training import mesh as meshes
from evmamba_jax.training.config import Duration
from evmamba_jax.training.setup import Setup
from evmamba_jax.training.sparse import ITEM
from evmamba_jax.training.state import TrainState

run_here, refused_here = (
    functools.partial(function, config=TINY + ":convolutions") for function in (command.run_here, command.refused_here)
)
GRADUAL = tuple(
    f"--config.pruning.{text}"
    for text in ("method=gradual", "final=0.75", "begin.steps=8", "end.steps=28", "every.steps=5", "scope=global")
)


ONE_SCAN = {"width": 8, "depths": (1, 0, 0, 0), "patch_size": 2, "d_state": 2}


def configured(**changes):
    """Return a config in which the moving average, clipping, decay and mixing are on."""
    config = get_config("convolutions")
    config.pruning.method, config.pruning.final = "one_shot", 0.6
    config.pruning.begin = Duration(steps=2)
    for name, value in changes.items():
        part, _, field = name.partition("__")
        setattr(getattr(config, part) if field else config, field or part, value)
    return config


def set_up(config, devices=1, examples=64):
    task = task_of(config)(config, [str(k) for k in range(10)])
    return Setup(task, meshes.make_mesh(config, jax.devices()[:devices]), examples)


def batch_of(seed, setup):
    rng = np.random.default_rng(seed)
    size = setup.task.config.batch_size
    batch = {
        "image": rng.integers(0, 256, (size, 8, 8, 1), np.uint8),
        "label": rng.integers(0, 10, size).astype(np.int32),
        "corrupt": np.zeros(size, np.int32),
    }
    return jax.device_put(batch, meshes.batch_sharding(setup.mesh))


def moments(opt_state, name):
    """Return the arrays that an optimizer's state has for a parameter."""
    found = jax.tree_util.tree_flatten_with_path(opt_state)[0]
    return [leaf for path, leaf in found if getattr(path[-1], "key", None) == name]


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__weight_decay": 0.2, "accumulation": 2},
        {"optim__name": "lamb", "optim__mesa": 0.5, "pruning__score": "taylor"},
    ],
)
def test_what_is_pruned_stays_exactly_zero(changes):
    config = configured(**changes)
    setup = set_up(config)
    step, draw, state = setup.compiled, setup.drawing(), setup.first_state()
    for t in range(6):
        if setup.sparse.due(t):
            state = draw(state, setup.sparse.zeros(t))
        state = step(state, batch_of(t, setup))
        masks = {name: np.asarray(mask) for name, mask in state.extra[ITEM]["masks"].items()}
        assert sum((~mask).sum() for mask in masks.values()) == (
            sum(round(0.6 * mask.size) for mask in masks.values()) if t >= 2 else 0
        )
        for name, mask in masks.items():
            arrays = [state.model.params[name], state.ema.params[name], *moments(state.opt_state, name)]
            assert len(arrays) == 4
            for array in arrays:
                assert not np.asarray(array)[~mask].any(), (t, name)
            assert np.asarray(state.model.params[name])[mask].all()


def test_scores_see_the_dense_gradients_since_the_last_drawing():
    """Against sums that this test adds up itself, of gradients as SGD without momentum shows them."""
    config = configured(pruning__score="movement", optim__ema_decay=0.0)
    setup = set_up(config)
    step, state = jax.jit(setup.step()[0]), setup.first_state()
    sums = dict.fromkeys(setup.abstract_state.extra[ITEM]["scores"], 0.0)
    gradient = jax.jit(jax.grad(lambda params, s, b: loss_of(setup, params, s, b)))
    for t in range(2):
        batch = batch_of(t, setup)
        grads = gradient(state.model.params, state, batch)
        sums = {name: total - state.model.params[name] * grads[name] for name, total in sums.items()}
        state = step(state, batch)
    for name, total in sums.items():
        np.testing.assert_allclose(state.extra[ITEM]["scores"][name], total, rtol=2e-3, atol=1e-7)
    state = setup.drawing()(state, setup.sparse.zeros(2))
    assert not any(np.asarray(total).any() for total in state.extra[ITEM]["scores"].values())


def loss_of(setup, params, state, batch):
    """Return the loss of a step by the task alone."""
    task, config = setup.task, setup.task.config
    graphdef, _, _ = split(task.model)
    model = merge(graphdef, params, state.model.batch_stats)
    model.train()
    input_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
    inputs = task.inputs(input_key, batch)
    key = jax.random.fold_in(model_key, 0)
    return task.loss(model, inputs, key, Moment(state.step, setup.steps_per_epoch, None))[0]


def test_without_a_method_the_step_knows_nothing_of_masks():
    config = configured(pruning__method="")
    setup = set_up(config)
    assert setup.abstract_state.extra == {}
    plain = setup.lower().as_text()
    setup.sparse.keep = lambda state, grads: (grads, state.extra)
    assert setup.lower().as_text() == plain


@pytest.mark.parametrize(("devices", "fsdp"), [(8, 1), (4, 4)])
def test_masks_of_equal_arrays_are_equal_on_every_mesh(devices, fsdp):
    config = configured(pruning__scope="global")
    found = []
    for count, shared in ((1, 1), (devices, fsdp)):
        config.mesh.fsdp = shared
        setup = set_up(config, count)
        state = setup.drawing()(setup.first_state(), setup.sparse.zeros(2))
        found.append(jax.device_get(state.extra[ITEM]["masks"]))
    for name, mask in found[0].items():
        np.testing.assert_array_equal(mask, found[1][name])


def test_masks_of_runs_on_other_meshes_are_nearly_equal():
    """Parameters that rounding alone keeps apart after some steps; 0.2 % of the entries may differ."""
    config = configured(pruning__scope="global", pruning__score="taylor", optim__lr=0.01)
    found = []
    for count in (1, 8):
        setup = set_up(config, count)
        state = setup.first_state()
        for t in range(4):
            state = setup.compiled(state, batch_of(t, setup))
        state = setup.drawing()(state, setup.sparse.zeros(2))
        masks = jax.device_get(state.extra[ITEM]["masks"])
        found.append((np.concatenate([masks[name].ravel() for name in sorted(masks)]), state.model.params))
    (one, params), (eight, others) = found
    assert any((np.asarray(params[name]) != np.asarray(others[name])).any() for name in params)
    assert (one != eight).mean() <= 0.002


def test_early_birds_are_drawn_until_they_stand_still(tmp_path):
    """A rate of nearly nothing: masks of magnitudes never move, and the ticket is found at the third of them."""
    config = configured(pruning__method="early_bird", pruning__length=2, optim__lr=1e-9)
    config.pruning.structure, config.model.options = "channels", ONE_SCAN
    config.optim.min_lr = config.optim.warmup_lr = 1e-9
    config.pruning.begin, config.pruning.every = Duration(steps=1), Duration(steps=1)
    config.duration, config.optim.warmup = Duration(steps=6), Duration(steps=1)
    step = set_up(config).compiled  # the same for both
    for takes in ("mask", "report"):
        config.pruning.on_ticket = takes
        early_birds(set_up(config), step, takes, tmp_path / takes)


def early_birds(setup, step, takes, folder):
    """Take six steps, with a state that goes through a checkpoint before each."""
    draw, state, told, zeros = setup.drawing(), setup.first_state(), [], []
    for t in range(6):
        with Checkpoints(folder / str(t)) as checkpoints:
            checkpoints.save(t, state.items(), meta={})
            state = TrainState.of_items(checkpoints.restore(setup.abstract_state.items())[1])
        if setup.sparse.due(t):
            state = draw(state, setup.sparse.zeros(t))
            told.append(setup.sparse.told(state, t))
        state = step(state, batch_of(t, setup))
        masks = setup.sparse.masks(state)
        zeros.append(sum(int((~np.asarray(mask)).sum()) for mask in masks.values()))
    (group,) = pruning.channels(setup.task.model)
    kept = {group.name: np.arange(group.size) >= round(0.6 * group.size)}
    whole = sum(int((~m).sum()) for m in pruning.channel_masks(state.model.params, [group], kept).values())
    assert zeros == ([0, 0, 0, whole, whole, whole] if takes == "mask" else [0] * 6)
    assert [bool(text) for text in told] == [False, False, True, False, False]
    assert ("is taken" if takes == "mask" else "is not taken") in told[2]
    steps, seen = setup.sparse.birds(state.extra[ITEM])
    assert steps == [1, 2, 3, 4, 5]
    assert (seen[0] == seen[1]).all()
    assert setup.sparse.figures(state)["mask_distance"] < 0.01


def test_channels_are_pruned_with_all_that_is_tied_to_them_and_cut_out():
    config = configured(pruning__structure="channels", pruning__score="taylor", pruning__final=0.5)
    config.model.options = ONE_SCAN
    setup = set_up(config)
    step, draw, state = setup.compiled, setup.drawing(), setup.first_state()
    for t in range(4):
        if setup.sparse.due(t):
            state = draw(state, setup.sparse.zeros(t))
        state = step(state, batch_of(t, setup))
    (group,) = pruning.channels(setup.task.model)
    for variables in (state.model, state.ema):
        model = merge(split(setup.task.model).graphdef, variables.params, variables.batch_stats)
        smaller = pruning.cut(model, pruning.zero_channels(variables.params, [group]))
        assert smaller.config.inner == ((group.name, 8),)
        images = np.random.default_rng(0).standard_normal((2, 8, 8, 1), np.float32)
        wanted, found = (np.asarray(jax.jit(lambda x, m=m: m(x))(images)) for m in (model, smaller))
        assert np.abs(wanted - found).max() < 1e-5 * np.sqrt((wanted**2).mean())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare("digits", folder)
    return f"--config.data.data_dir={folder}"


@pytest.fixture(scope="module")
def pruned(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pruned") / "run"
    code, out, err = run_here(data, *GRADUAL, "--workdir", workdir)
    assert code == 0, out + err
    return workdir


def test_a_run_writes_what_it_pruned(pruned):
    table = list(csv.DictReader((pruned / "sparsity.csv").read_text().splitlines()))
    params, _, _ = load_model(pruned)
    own = [row for row in table if row["path"] in params]
    assert {row["path"] for row in own} == set(prunable(params))
    for row in own:
        assert int(row["zeros"]) == (params[row["path"]] == 0).sum()
    candidates = sum(params[row["path"]].size for row in own)
    assert int(table[-2]["zeros"]) == round(0.75 * candidates) == int(table[-1]["zeros"])
    assert int(table[-1]["size"]) == sum(p.size for p in params.values())
    assert (pruned / "sparsity.png").is_file()
    rows = [json.loads(line) for line in (pruned / "metrics.jsonl").read_text().splitlines()]
    seen = [row["sparsity"] for row in rows if "sparsity" in row]
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] == pytest.approx(0.75, abs=1e-3)


def test_a_run_that_stops_at_a_drawing_goes_on_to_the_bit(pruned, data, tmp_path):
    first = [data, *GRADUAL, "--config.save_every.steps=13", "--workdir", tmp_path / "run"]

    class Enough(Exception):
        pass

    original = Checkpoints.save

    def last(self, step, items, **about):
        original(self, step, items, **about)
        assert step == 13  # before whose step masks are drawn
        self.wait()
        raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", last)
        with pytest.raises(Enough):
            run_here(*first)
    code, out, err = run_here(*first)
    assert code == 0, out + err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (pruned / "metrics.jsonl").read_bytes()
    for ema in (False, True):
        a, b = (load_model(folder, ema=ema)[0] for folder in (pruned, tmp_path / "run"))
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_zeros_of_a_run_can_be_kept(pruned, data, tmp_path):
    start = (data, f"--config.init_from={pruned}", "--config.duration.steps=12", "--config.optim.lr=0.01")
    code, out, err = run_here(*start, "--config.pruning.method=keep", "--workdir", tmp_path / "kept")
    assert code == 0, out + err
    code, out, err = run_here(*start, "--workdir", tmp_path / "dense")
    assert code == 0, out + err
    before, kept, dense = (load_model(folder)[0] for folder in (pruned, tmp_path / "kept", tmp_path / "dense"))
    names = prunable(before)
    assert all(((kept[name] == 0) == (before[name] == 0)).all() for name in names)
    left, zeros = (sum(int((params[name] == 0).sum()) for name in names) for params in (dense, before))
    assert left < 0.2 * zeros  # a pixel that is always black moves nothing


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["method=gradual", "final=0.2", "initial=0.5", "end.steps=9"], "final is 0.2 and initial 0.5: sparsity never"),
        (["method=gradual"], "config.pruning.end is not set"),
        (["method=gradual", "end.steps=40"], "goes from step 0 to step 40, and the run has 40"),
        (["method=one_shot", "begin.steps=99"], "begin is step 99, and the run has 40: begin earlier"),
        (["method=one_shot", "score=taylor"], "score='taylor' looks at gradients, of which there are none at step 0"),
        (["method=one_shot", "factors=head.kernel"], "factors has 'head.kernel': write PATTERN=FACTOR"),
        (["method=one_shot", "factors=haed.*=0.5"], "'haed.*', which is the path of nothing that is pruned"),
        (["method=keep"], "method=keep keeps the zeros of init_from: set config.init_from"),
        (["method=one_shot", "structure=channels"], "EfficientVMamba has no channels that can be cut"),
        (["method=one_shot", "multiple_of=8"], "multiple_of=8 needs config.pruning.structure=channels"),
        (["method=early_bird"], "early_bird draws masks of channels: set structure=channels"),
        (["method=often"], "method='often'"),
    ],
)
def test_mistakes_get_one_line(flags, message, data, tmp_path):
    said = refused_here(data, *(f"--config.pruning.{flag}" for flag in flags), "--workdir", tmp_path / "run")
    assert message in said


def test_another_method_is_refused_for_a_run_that_goes_on(pruned, data):
    said = refused_here(data, *GRADUAL, "--config.pruning.method=one_shot", "--workdir", pruned)
    assert "config.pruning.method is 'one_shot', but the run in" in said
    said = refused_here(data, *GRADUAL, "--config.pruning.final=0.9", "--workdir", pruned)
    assert "on which its masks depend" in said


def test_too_few_early_birds_are_refused():
    config = configured(pruning__method="early_bird", pruning__structure="channels")
    config.model.options, config.pruning.every = ONE_SCAN, Duration(steps=10)
    with pytest.raises(UserError, match="draws 4 masks in the run, and length=5 distances between them must be small"):
        set_up(config)


def test_low_rank_additions_are_refused():
    with pytest.raises(UserError, match="low-rank additions fill zeros again"):
        set_up(configured(tune__method="lora"))


def test_frozen_weights_are_not_pruned():
    config = configured(tune__freeze=("stages.*",))
    names = prunable(split(abstract_model("evmamba_t", **config.model.options, num_classes=10, in_channels=1)).params)
    assert set(set_up(config).abstract_state.extra[ITEM]["masks"]) == {
        name for name in names if not name.startswith("stages.")
    }
