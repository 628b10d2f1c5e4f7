"""Released weights beside what is published of them: counted in parts, gone on with, left out with a reason."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from official_weights import save_pth, weights_of
from PIL import Image

from evmamba_jax import create_model, preprocess
from evmamba_jax.__main__ import main
from evmamba_jax.models import abstract_model, registry
from evmamba_jax.models.registry import model_card
from evmamba_jax.training.evaluator import Evaluator
from evmamba_jax.weights import places

CLASSES, PICTURES = 6, 19
OPTIONS = {"width": 8, "depths": (0, 0, 1, 0), "num_classes": CLASSES}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures in val/CLASS/."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(5)
    for i in range(PICTURES):
        file = folder / "val" / f"n{i % CLASSES}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        small.resize((50, 40), Image.Resampling.BICUBIC).save(file)
    return folder


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Two small models that count as published, the file of the first in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "_is_online", lambda: False)
    published = {name: registry.VARIANTS[name] for name in ("evmamba_t", "evmamba_s")}
    for name in registry.VARIANTS.copy():
        monkeypatch.delitem(registry.VARIANTS, name)
    for name, (family, config, card) in published.items():
        small = registry.dataclasses.replace(config, **OPTIONS)
        card = registry.dataclasses.replace(card, input_size=(32, 32), top1=40.0, top5=90.0)
        monkeypatch.setitem(registry.VARIANTS, name, registry.Variant(family, small, card))
    places.cache().mkdir(parents=True)
    file = places.cache() / model_card("evmamba_t").checkpoint
    save_pth(file, weights_of(abstract_model("evmamba_t")))
    return file


def verify(data, out, *more):
    return main(["weights", "verify", "--data-dir", str(data), "--out", str(out), "--batch-size", "8", *more])


def correct(data, file):
    """Return top-1 and top-5 in per cent, one picture after the other."""
    model, ranks = create_model("evmamba_t", pretrained=file), []
    for picture in sorted(data.glob("val/*/*.png")):
        logits = np.asarray(model(jnp.asarray(preprocess(picture, "evmamba_t"))))[0]
        label = int(picture.parent.name[1:])
        ranks.append(int((logits > logits[label]).sum()))
    return [100 * float(np.mean(np.array(ranks) < k)) for k in (1, 5)]


def cells(out, name):
    (row,) = [line for line in (out / "table.md").read_text().splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_what_is_counted_is_kept_and_gone_on_with(data, released, tmp_path, monkeypatch, capsys):
    asked, call = [], Evaluator.__call__

    def interrupted(self, *args, **named):
        asked.append(len(self.source))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return call(self, *args, **named)

    monkeypatch.setattr(Evaluator, "__call__", interrupted)
    command = (data, tmp_path / "out", "--models", "evmamba_t", "--part", "8")
    assert verify(*command) == 130
    assert verify(*command) == 0
    assert asked == [8, 8, 8, 3]
    top1, top5 = correct(data, released)
    assert cells(tmp_path / "out", "evmamba_t") == [
        *("evmamba_t", "40", f"{top1:.3f}", f"{top1 - 40:+.3f}"),
        *("90", f"{top5:.3f}", str(PICTURES), released.name),
    ]
    assert 0 < top1 < top5
    assert "of 50,000 images; here there are 19, so they do not compare" in (tmp_path / "out/table.md").read_text()

    with (tmp_path / "out" / "parts.jsonl").open("a") as lines:
        lines.write('{"model": "evm')  # a kill in the middle of a line
    save_pth(released, {name: -array for name, array in weights_of(abstract_model("evmamba_t")).items()})
    assert verify(*command) == 0
    assert asked[4:] == [8, 8, 3]  # other weights are counted anew
    digests = {json.loads(line)["weights"] for line in (tmp_path / "out/parts.jsonl").read_text().splitlines()[:3]}
    assert len(digests) == 1


def test_a_model_without_its_file_is_left_out_and_said(data, released, tmp_path, capsys):
    assert verify(data, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "evmamba_s: left out: the released file of evmamba_s cannot be fetched" in said
    assert "error: 1 of 2 models were left out, the lines above say why: evmamba_s" in said
    assert cells(tmp_path / "out", "evmamba_s")[-1].startswith("left out: the released file of evmamba_s cannot")
    assert cells(tmp_path / "out", "evmamba_t")[-1] == released.name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--models", "evmamba_tt"], "is no model's name or pattern, did you mean 'evmamba_t'"),
        (["--part", "0"], "--part is 0; it must be 1 or more"),
        (["--batch-size", "-1"], "--batch-size is -1; it must be 1 or more"),
        (["--batch-size", "3"], "batch_size is 3; it must be a multiple of devices"),
    ],
)
def test_mistakes_get_one_line(data, tmp_path, more, message, capsys):
    assert verify(data, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
