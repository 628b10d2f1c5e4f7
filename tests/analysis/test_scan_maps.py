"""Maps of scans: the scans' own results come back from them; decay against loops; what commands draw and refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from evmamba_jax import create_model
from evmamba_jax.analysis import activation_map, activation_maps, decay_map, decay_ratio, map_commands, rollout
from evmamba_jax.analysis.__main__ import main
from evmamba_jax.analysis.scanning import find_layer, record, scan_layers
from evmamba_jax.analysis.subjects import Subject
from evmamba_jax.data.config import DataConfig
from evmamba_jax.errors import UserError
from pallas_kernels import Chain, Order

VMAMBA = {"width": 4, "depths": (1, 0, 0, 0), "num_classes": 3}
MSVMAMBA = {"width": 4, "depths": (1, 0, 0, 0)}
VIM = {"width": 8, "depth": 1, "image_size": 16, "patch_size": 4, "stride": 4, "d_state": 3, "remat": "block"}
VISION = {"width": 4, "stem_width": 2, "depths": (0, 0, 1, 0), "num_heads": (1, 1, 1, 1), "window_size": (1, 1, 3, 1)}


# Where the pixels of what a scan gets or returns, (B, G, H, W, E), stand on the map: (B, places, E), by hand.


def as_it_is(array):
    assert array.shape[1] == 1
    return array.reshape(len(array), -1, array.shape[-1])


def in_windows(array):
    """Two by two windows of three by three pixels."""
    array = array.reshape(len(array), 2, 2, 3, 3, -1)
    return array.transpose(0, 1, 3, 2, 4, 5).reshape(len(array), 36, -1)


def class_token_in_the_middle(array):
    tokens = array[:, 0, 0]
    middle = tokens.shape[1] // 2
    return np.concatenate([tokens[:, :middle], tokens[:, middle + 1 :], tokens[:, middle : middle + 1]], 1)


def three_ways(array):
    """Rows backwards, columns, columns backwards of three by three pixels, one after another: their three maps."""
    ways = array.reshape(len(array), 3, 3, 3, -1)
    maps = [ways[:, 0, ::-1, ::-1], ways[:, 1].swapaxes(1, 2), ways[:, 2, ::-1, ::-1].swapaxes(1, 2)]
    return np.stack(maps, 1).reshape(len(array), 3, 9, -1)


def rows_back(array):
    return np.flip(array, 3).reshape(len(array), -1, array.shape[-1])


def columns(array):
    return array[:, :, 0].swapaxes(1, 2).reshape(len(array), -1, array.shape[-1])


def columns_back(array):
    return columns(np.flip(array, 3))


SNAKE = Chain((Order((0, 0), (2, 1)), Order((1, 0), (2, 1), reverse=True)))
# Model, options, side of the images, and for each layer: name, walks, where what it gets and returns stands.
CASES = {
    "cross": ("vmamba_t", VMAMBA, 15, {"stages.0.blocks.0.mixer.scan": (4, as_it_is)}),
    "snake": (
        "vmamba_t",
        VMAMBA | {"scan": (SNAKE,), "remat": "block"},
        15,
        {"stages.0.blocks.0.mixer.scan": (1, as_it_is)},
    ),
    "cascade": (
        "vmamba_t",
        VMAMBA | {"scan": "cascade"},
        15,
        {
            "stages.0.blocks.0.mixer.scan:rows_back": (1, rows_back),
            "stages.0.blocks.0.mixer.scan:rows": (1, lambda a: a.reshape(len(a), -1, a.shape[-1])),
            "stages.0.blocks.0.mixer.scan:columns_back": (1, columns_back),
            "stages.0.blocks.0.mixer.scan:columns": (1, columns),
        },
    ),
    "atrous": (
        "evmamba_t",
        {"width": 4, "depths": (1, 1, 0, 0), "patch_size": 1, "d_state": 3},
        5,
        {"stages.0.blocks.0.op.scan": (4, as_it_is), "stages.1.blocks.0.op.scan": (4, as_it_is)},
    ),
    "multi-scale 1": (
        "msvmamba_n",
        MSVMAMBA,
        20,
        {"stages.0.blocks.0.mixer.scan:full": (1, as_it_is), "stages.0.blocks.0.mixer.scan:low": (3, three_ways)},
    ),
    "multi-scale 1, apart": (
        "msvmamba_n",
        MSVMAMBA | {"leak_state": False},
        20,
        {"stages.0.blocks.0.mixer.scan:full": (1, as_it_is), "stages.0.blocks.0.mixer.scan:low": (3, three_ways)},
    ),
    "multi-scale 2": (
        "msvmamba_t_v2",
        MSVMAMBA,
        20,
        {"stages.0.blocks.0.mixer.scan:full": (1, as_it_is), "stages.0.blocks.0.mixer.scan:low": (3, as_it_is)},
    ),
    "vim": ("vim_t", VIM, 16, {"blocks.0.mixer": (2, class_token_in_the_middle)}),
    "windows": ("mambavision_t", VISION, 80, {"stages.2.blocks.0.mixer.scan": (1, in_windows)}),
    "course": (
        "course_vim",
        {"width": 4, "depth": 1, "d_state": 3, "dt_rank": 2, "image_size": 12},
        12,
        {"blocks.0.mixer": (2, as_it_is)},
    ),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def built(name, options):
    """Return a small model in float64, whose scans forget at once and remember long."""
    model = create_model(name, **options)
    draw = np.random.default_rng(0).normal
    nnx.update(model, jax.tree.map(lambda a: jnp.asarray(a + draw(0, 0.1, a.shape)), nnx.state(model)))
    return model


def images(model, side, batch=2):
    return jnp.asarray(np.random.default_rng(1).normal(size=(batch, side, side, model.in_channels)))


@pytest.mark.parametrize("case", CASES)
def test_the_result_of_the_scans_comes_back_from_the_map(case):
    name, options, side, expected = CASES[case]
    model = built(name, options)
    x = images(model, side)
    layers = scan_layers(model, side)
    assert [layer.name for layer in layers] == [*expected]
    for layer, of_layer in zip(layers, record(model, x, layers), strict=True):
        walks, stands = expected[layer.name]
        assert len(layer.walks) == walks
        every = [divmod(i, layer.size[1]) for i in range(layer.size[0] * layer.size[1])]
        every += ["class"] * layer.class_token
        own = layer._replace(inside=layer.size)  # the padding of windows too
        found = activation_maps.unrolled(own, of_layer, every, channels="each", skip=True)
        weights = found.walks.reshape(2, len(every), walks, -1, layer.channels)
        merged = found.merged.reshape(2, len(every), -1, layer.channels)
        if layer.class_token:
            weights = np.concatenate([weights, found.class_walks[:, :, :, None]], 3)
            merged = np.concatenate([merged, found.class_merged[:, :, None]], 2)
        np.testing.assert_allclose(weights.sum(2), merged, rtol=0, atol=1e-12)
        got, returned = ([stands(array) for array in arrays] for arrays in zip(*of_layer, strict=True))
        if stands is three_ways:
            np.testing.assert_array_equal(got[0][:, 0], got[0][:, 1])  # of one map
            result, got = returned[0], [got[0][:, 0]]
        else:
            result = sum(returned)
        # Each walk by itself: of several calls each has one.
        calls = got if len(got) > 1 else got * walks
        by_walk = np.stack([np.einsum("bpme,bme->bpe", weights[:, :, w], calls[w]) for w in range(walks)], 1)
        wanted, back = (result, by_walk) if stands is three_ways else (result, by_walk.sum(1))
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(back, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())


def test_what_is_recorded_is_what_the_scan_of_that_block_gets():
    """Blocks 0 to 2 are equal and so one loop, if none is recorded."""
    model = built("vim_t", VIM | {"depth": 4})
    x = images(model, 16)
    layer = find_layer(scan_layers(model, 16), "blocks.2.mixer")
    ((forward, backward),) = record(model, x, [layer])
    tokens = model.tokens(x)
    for block in model.blocks[:2]:
        tokens = block(tokens)
    mixer = model.blocks[2].mixer
    scanned, _ = jnp.split(mixer.in_proj(model.blocks[2].norm(tokens)), 2, -1)
    for direction, recorded in ((mixer.forward, forward), (mixer.backward, backward)):
        np.testing.assert_allclose(recorded.x[:, 0, 0], nnx.silu(direction.conv(scanned)), rtol=0, atol=1e-12)
        np.testing.assert_allclose(recorded.y[:, 0, 0], direction(scanned), rtol=0, atol=1e-12)


# Terms of the recurrence by hand, for one order: x (L, E) in its sequence.


def terms(scan, k, x):
    x_proj, dt_proj, bias, a_log = (
        np.asarray(parameter[k]) for parameter in (scan.x_proj, scan.dt_proj, scan.dt_bias, scan.A_log)
    )
    rank, state = len(dt_proj), a_log.shape[1]
    steps, b, c = x @ x_proj[:, :rank], x @ x_proj[:, rank : rank + state], x @ x_proj[:, rank + state :]
    return np.log1p(np.exp(steps @ dt_proj + bias)), -np.exp(a_log), b, c


def sequence(order, x):
    """Read x (H, W, E) along an order, with zeros where it is padding."""
    flat = np.concatenate([x.reshape(-1, x.shape[-1]), np.zeros((1, x.shape[-1]))])
    return flat[order.indices(*x.shape[:2])]


def official(scan, x, mode):
    """Compute the map that VMamba's ``AttnMamba.attnmap_mamba`` shows as "all": x is (side, side, E)."""
    side, _, width = x.shape
    tokens = side * side
    ways = [x, x.swapaxes(0, 1), x[::-1, ::-1], x.swapaxes(0, 1)[::-1, ::-1]]
    total = np.zeros((tokens, tokens))
    for k, way in enumerate(ways):
        dt, a, b, c = terms(scan, k, way.reshape(tokens, width))
        attention = np.zeros((tokens, tokens))
        for e in range(width):
            w = np.exp(np.cumsum(dt[:, e])[:, None] * a[e])  # (L, N)
            q, key = (c, b) if mode == "CB" else (c * w, b / np.maximum(w, 1e-20))
            attention += q @ (key * dt[:, e, None] if mode == "CwBdtw" else key).T / width
        attention = np.tril(attention).reshape(side, side, side, side)
        if k >= 2:
            attention = attention[::-1, ::-1, ::-1, ::-1]
        if k % 2:
            attention = attention.transpose(1, 0, 3, 2)
        total += attention.reshape(tokens, tokens)
    return total


@pytest.fixture(scope="module")
def crossed():
    """Return a small VMamba whose scans forget within a few tokens, images, the layer and what its scan gets."""
    with jax.enable_x64(True):
        model = built("vmamba_t", VMAMBA)
        scan = model.stages[0].blocks[0].mixer.scan
        scan.dt_bias[...] += 4.0
        scan.A_log[...] += 2.0
        x = images(model, 15)
        (layer,) = scan_layers(model, 15)
        ((recorded,),) = record(model, x, [layer])
        yield model, x, layer, recorded


@pytest.mark.parametrize("mode", ["CB", "CwBw", "CwBdtw"])
def test_the_maps_of_the_official_code(crossed, mode):
    model, x, layer, recorded = crossed
    found = activation_map(model, x, layer, weights=mode, channels="mean")
    for b in range(2):
        wanted = official(layer.scans[0], recorded.x[b, 0], mode)
        np.testing.assert_allclose(found.merged[b].reshape(16, 16), wanted, rtol=1e-9, atol=1e-12)


def test_the_official_quotient_loses_what_is_far_and_the_exact_map_does_not(crossed):
    model, x, *_ = crossed
    exact, quotient = (
        activation_map(model, x, 0, [(3, 3)], weights=weights).walks[0, 0, 0] for weights in ("exact", "CwBdtw")
    )
    np.testing.assert_allclose(quotient[0], exact[0], rtol=0, atol=1e-12)  # nothing reaches so far
    assert quotient[3, 3] < 0.5 * exact[3, 3]  # although nothing lies between


def test_means_over_channels_and_blocks(crossed, monkeypatch):
    model, x, layer, _ = crossed
    pixels = [(2, 1), (0, 3), (2, 1)]
    each = activation_map(model, x, layer.name, pixels, channels="each")
    monkeypatch.setattr(activation_maps, "_BLOCK", 70)  # a channel at a time
    size = activation_map(model, x, 0, pixels)
    signed = activation_map(model, x, -1, pixels, channels="mean")
    assert size.walks.shape == (2, 3, 4, 4, 4)
    np.testing.assert_allclose(size.walks, np.abs(each.walks).mean(-1), rtol=1e-12)
    np.testing.assert_allclose(size.merged, np.abs(each.walks.sum(2)).mean(-1), rtol=1e-12)
    np.testing.assert_allclose(signed.merged, each.merged.mean(-1), rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(size.merged[:, 0], size.merged[:, 2])


def test_rollout(crossed):
    model, x, layer, _ = crossed
    maps = [activation_map(model, x, layer, channels=channels) for channels in ("absolute", "mean")]
    found = rollout(maps)
    for b in range(2):
        product = np.eye(16)
        for one in maps:
            rows = one.merged[b].reshape(16, 16)
            rows = 0.5 * ((rows - rows.min()) / (rows.max() - rows.min()) + np.eye(16))
            product = np.array([row / row.sum() for row in rows]) @ product
        np.testing.assert_allclose(found[b].reshape(16, 16), product, rtol=1e-12)
    with pytest.raises(UserError, match="maps of all pixels"):
        rollout([activation_map(model, x, layer, [(0, 0)])])


# Decay, against loops.


def left(scan, k, x, order, end):
    """Return the mean over channels and states of what each token of an order leaves at the one numbered ``end``."""
    dt, a, _, _ = terms(scan, k, sequence(order, x))
    decays = np.zeros(len(dt))
    for s in range(end + 1):
        decay = np.ones_like(a)
        for r in range(s + 1, end + 1):
            decay *= np.exp(dt[r][:, None] * a)
        decays[s] = decay.mean()
    return decays


def on_map(order, decays, height, width):
    places = order.indices(height, width)
    found = np.zeros(height * width)
    for place, decay in zip(places, decays, strict=True):
        if place >= 0:
            found[place] = decay
    return found.reshape(height, width)


def test_decay_of_the_atrous_scan_with_padding():
    name, options, side, _ = CASES["atrous"]
    model = built(name, options)
    x = images(model, side)
    layer = scan_layers(model, side)[0]
    ((recorded,),) = record(model, x, [layer])
    ends = {None: ((2, 2), (1, 2), (2, 1), (1, 1)), (4, 3): ((4, 2), (3, 2), (4, 3), (3, 3)), "last": ("last",) * 4}
    for pixel, wanted in ends.items():
        found = decay_map(model, x, layer, pixel)
        assert found.ends == wanted
        for k, order in enumerate(recorded_orders(layer)):
            places = order.indices(5, 5).tolist()
            end = 8 if pixel == "last" else places.index(wanted[k][0] * 5 + wanted[k][1])
            for b in range(2):
                expected = on_map(order, left(layer.scans[0], k, recorded.x[b, 0], order, end), 5, 5)
                np.testing.assert_allclose(found.walks[b, k], expected, rtol=1e-10)


def recorded_orders(layer):
    return [walk.order for walk in layer.walks]


@pytest.mark.parametrize(
    ("case", "number", "set_", "side", "titles"),
    [
        ("multi-scale 2", 1, 1, 3, ["chain, 1 of 3: rows, backwards", "chain, 2 of 3: columns"]),
        ("snake", 0, 0, 4, ["chain of 2"]),
    ],
)
def test_decay_of_a_chain_starts_again_where_pixels_are_visited_again(case, number, set_, side, titles):
    name, options, image_size, _ = CASES[case]
    model = built(name, options)
    x = images(model, image_size, batch=1)
    layer = scan_layers(model, image_size)[number]
    assert [walk.title for walk in layer.walks][:2] == titles
    ((recorded,),) = record(model, x, [layer])
    found = decay_map(model, x, layer, (2, 1))
    assert found.ends == ((2, 1),) * len(layer.walks)
    for k, walk in enumerate(layer.walks):
        end = walk.order.indices(side, side).tolist().index(2 * side + 1)
        expected = on_map(walk.order, left(layer.scans[0], set_, recorded.x[0, 0], walk.order, end), side, side)
        np.testing.assert_allclose(found.walks[0, k], expected, rtol=1e-10)


def test_the_ratio_of_rows_and_columns(crossed):
    model, x, layer, _ = crossed
    found = decay_map(model, x, layer, (1, 2))
    ratio = decay_ratio(found)
    rows, columns = found.walks[:, [0, 2]].max(1), found.walks[:, [1, 3]].max(1)
    for at in np.ndindex(ratio.shape):
        one, other = rows[at], columns[at]
        assert ratio[at] == pytest.approx(max(one / other, other / one))
    assert ratio[0, 1, 2] == 1
    assert ratio.max() > 10
    one_way = found._replace(layer=layer._replace(walks=layer.walks[:1]), walks=found.walks[:, :1])
    with pytest.raises(UserError, match="by rows and by columns"):
        decay_ratio(one_way)


# The commands.


@pytest.fixture
def subjects(monkeypatch):
    """Let the commands open small models by these names."""
    given = {"vim": ("vim_t", VIM, 16), "ms": ("msvmamba_t_v2", MSVMAMBA, 20)}
    given["s4d"] = ("mambavision_t", VISION | {"ssm": "s4d", "d_state": 2}, 80)

    def opened(name, *, image_size):
        kind, options, side = given[name]
        model = create_model(kind, num_classes=3, **options)
        return Subject(name, kind, model, DataConfig(image_size=image_size or side), (), "initial values")

    monkeypatch.setattr(map_commands, "open_subject", opened)
    monkeypatch.setattr("evmamba_jax.analysis.scans.open_subject", opened)


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "$x$ \u5199.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def test_the_list(subjects, capsys):
    assert main(["scans", "ms"]) == 0
    head, full, low = capsys.readouterr().out.splitlines()
    assert head.split() == ["layer", "map", "channels", "states", "walks"]
    assert full.split()[:5] == ["0", "stages.0.blocks.0.mixer.scan:full", "5x5", "4", "1"]
    assert low.split()[:5] == ["1", "stages.0.blocks.0.mixer.scan:low", "3x3", "4", "1"]
    assert low.split("  ")[-1].strip().split("; ")[1] == "chain, 2 of 3: columns"


def test_pictures_and_a_page(subjects, photograph, tmp_path, capsys):
    picture, page = tmp_path / "map.png", tmp_path / "maps.html"
    where = ["--pixel", "3", "12", "--class-token", "--out", str(picture)]
    assert main(["activation-map", "vim", photograph, "--layer", "blocks.0.mixer", *where]) == 0
    with Image.open(picture) as image:
        high = image.height
        assert np.asarray(image).std() > 10
    layers = ["--layer", "0", "--layer", "-1", "--pixel", "0", "0", "--pixel", "19", "19"]
    assert main(["decay-map", "ms", photograph, *layers, "--page", str(page), "--out", str(picture)]) == 0
    told = page.read_text()
    assert told.count("data:image/png;base64,") == 2
    assert "<h1>Decay map of ms</h1>" in told
    assert "<h2>ms, stages.0.blocks.0.mixer.scan:low, 3x3</h2>" in told
    assert "pixel (19, 19), on the map (4, 4)" in told
    assert "pixel (19, 19), on the map (2, 2)" in told
    with Image.open(picture) as image:
        assert image.height > 1.5 * high  # two layers of two pixels, not one
    assert capsys.readouterr().out.count(str(picture)) == 2


ERRORS = {
    (
        "activation-map",
        "vim",
        "--layer",
        "blocks.1.mixer",
    ): "unknown layer 'blocks.1.mixer', did you mean 'blocks.0.mix",
    (
        "activation-map",
        "ms",
        "--layer",
        "stages.0.blocks.0.mixer.scan",
    ): ":full' or 'stages.0.blocks.0.mixer.scan:low'?",
    ("decay-map", "vim", "--layer", "7"): "there is no layer 7; 'scans' lists them: 0 to 0",
    ("decay-map", "vim", "--pixel", "16", "3"): "--pixel 16 3 is outside of the image that the model sees: 0 to 15",
    ("activation-map", "ms", "--class-token"): "has no class token",
    (
        "activation-map",
        "vim",
        "--memory",
        "0.00001",
    ): "and memory=1e-05 allows less: take fewer images, or smaller ones",
    ("activation-map", "vim", "--size", "3"): "image size 3x3 is too small",
    ("scans", "s4d"): "MambaVision has no selective scan",
    ("activation-map", "vim", "--weights", "CwB"): "unknown --weights 'CwB', did you mean 'CwBw'?",
    ("decay-map", "vim", "--last", "--pixel", "0", "0"): "leave out --pixel and --class-token",
    (
        "activation-map",
        "vim",
        *["--pixel", "1", "1"] * 151,
    ): "151 lines (layers, images, pixels) are too many for a pict",
    ("decay-map", "vim", "--page", "maps.pdf"): "maps.pdf must end in .html",
}


@pytest.mark.parametrize("argv", ERRORS, ids=lambda argv: " ".join(argv[:4]))
def test_mistakes_are_told_in_a_line(argv, subjects, photograph, capsys):
    command, model, *more = argv
    assert main([command, model, *([] if command == "scans" else [photograph]), *more]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert ERRORS[argv] in told


def test_mistakes_in_the_functions(crossed):
    model, x, layer, _ = crossed
    with pytest.raises(UserError, match=r"pixel \(4, 0\) is outside of the map .* 4x4: rows 0 to 3 and columns 0 to 3"):
        activation_map(model, x, layer, [(0, 0), (4, 0)])
    with pytest.raises(UserError, match="unknown channels 'all'; allowed: 'absolute', 'mean', 'each'"):
        activation_map(model, x, layer, [(0, 0)], channels="all")
    with pytest.raises(
        UserError, match=r"16 pixels in 2 images, each channel, .*: take \d+ pixels or fewer at a time, or"
    ):
        activation_map(model, x, layer, channels="each", memory=0.03128)
    with pytest.raises(UserError, match=r"do not fit .* 20x20: list them by scan_layers\(model, \(20, 20\)\)"):
        activation_map(model, jnp.zeros((1, 20, 20, 3)), layer, [(0, 0)])
    with pytest.raises(UserError, match="unknown layer '--3'"):
        find_layer([layer], "--3")
    with pytest.raises(UserError, match="unknown layer 'stages'"):
        find_layer([layer], "stages")
