"""Files of official segmenters and detectors, as mmengine writes them, into our form and back, name for name."""

import chex
import numpy as np
import pytest
from flax import nnx
from official_weights import save_pth, weights_of
from safetensors.numpy import load_file

from evmamba_jax.arrays import split
from evmamba_jax.checkpoints import load_model
from evmamba_jax.data.coco_json import coco_categories
from evmamba_jax.detection import create_detector
from evmamba_jax.errors import UserError
from evmamba_jax.segmentation import create_segmenter
from evmamba_jax.segmentation.ade20k import ade20k_classes
from evmamba_jax.tasks import task_of
from evmamba_jax.tasks.opening import of_json, open_composed
from evmamba_jax.tasks.registry import kind_of
from evmamba_jax.weights import open_model, to_torch
from evmamba_jax.weights.__main__ import main
from evmamba_jax.weights.convert import table

BACKBONE = {"width": 8, "depths": (0, 0, 1, 0), "d_state": 2}
OPTIONS = {f"backbone.{name}": value for name, value in BACKBONE.items()}
MAKE = {"upernet": create_segmenter, "retinanet": create_detector}
# Shapes that mmseg and mmdet give such models, of 150 and 80 classes and a width of 16.
SHAPES = {
    "upernet": {
        "backbone.outnorm3.bias": (64,),
        "decode_head.psp_modules.3.1.conv.weight": (16, 64, 1, 1),
        "decode_head.psp_modules.3.1.bn.running_var": (16,),
        "decode_head.bottleneck.conv.weight": (16, 64 + 4 * 16, 3, 3),
        "decode_head.lateral_convs.2.conv.weight": (16, 32, 1, 1),
        "decode_head.fpn_convs.0.conv.weight": (16, 16, 3, 3),
        "decode_head.fpn_bottleneck.conv.weight": (16, 64, 3, 3),
        "decode_head.conv_seg.weight": (150, 16, 1, 1),
        "auxiliary_head.convs.0.conv.weight": (12, 32, 3, 3),
        "auxiliary_head.conv_seg.bias": (150,),
    },
    "retinanet": {
        "backbone.outnorm1.weight": (16,),
        "neck.lateral_convs.0.conv.weight": (16, 16, 1, 1),
        "neck.fpn_convs.3.conv.weight": (16, 64, 3, 3),
        "bbox_head.cls_convs.3.conv.bias": (16,),
        "bbox_head.retina_cls.weight": (720, 16, 3, 3),
        "bbox_head.retina_reg.weight": (36, 16, 3, 3),
    },
}


@pytest.fixture(scope="module", params=MAKE)
def official(request, tmp_path_factory):
    """Return the name of heads, a file, its arrays, and what was converted of it."""
    head, folder = request.param, tmp_path_factory.mktemp(request.param)
    more = {"aux_width": 12} if head == "upernet" else {}
    options = {"backbone": "evmamba_t", "width": 16, **more, "backbone_options": BACKBONE}
    model = nnx.eval_shape(lambda: MAKE[head](head, **options))
    arrays = weights_of(model)
    assert {name: arrays[name].shape for name in SHAPES[head]} == SHAPES[head]
    beside = {"meta": {"iter": 160_000}, "message_hub": {"log_scalars": {}, "runtime_info": {"iter": 5}}}
    save_pth(folder / "iter.pth", {**beside, "state_dict": arrays, "optimizer": {"state": {"0": np.float32([3])}}})
    given = ["--model", f"{head}:evmamba_t", "--torch", str(folder / "iter.pth"), "--out", str(folder / "ours")]
    options = [word for name, value in OPTIONS.items() for word in ("--option", f"{name}={value}")]
    assert main(["convert", *given, *options]) == 0
    return head, folder, arrays


def test_a_file_goes_there_and_back_to_the_bit(official, capsys):
    _, folder, arrays = official
    assert main(["export", "--checkpoint", str(folder / "ours"), "--out", str(folder / "back.safetensors")]) == 0
    assert capsys.readouterr().out.endswith("back.safetensors: these weights under the official names\n")
    back = load_file(folder / "back.safetensors")
    assert all(name.endswith("num_batches_tracked") for name in back.keys() - arrays.keys())
    chex.assert_trees_all_equal({name: back[name] for name in arrays}, arrays)


def test_what_was_converted_says_all_that_it_is(official):
    """Widths and classes are read off the file, and the classes' names are those of the official data set."""
    head, folder, arrays = official
    meta = load_model(folder / "ours")[2]
    names = ade20k_classes() if head == "upernet" else coco_categories().names
    assert meta["model"] == f"{head}:evmamba_t"
    assert meta["config"]["task"] == ("segmentation" if head == "upernet" else "detection")
    assert tuple(meta["class_names"]) == names
    assert names[4:6] == (("tree", "ceiling") if head == "upernet" else ("airplane", "bus"))
    opened = open_composed(folder / "ours")
    assert opened.task.about.width == 16
    assert opened.task.config.model.options == {**BACKBONE, "depths": [0, 0, 1, 0]}
    chex.assert_trees_all_equal({k: v for k, v in to_torch(opened.model).items() if k in arrays}, arrays)
    with pytest.raises(UserError, match=f"ours holds {head} with evmamba_t, no classifier"):
        open_model(folder / "ours")


def test_training_starts_from_it_with_classes_of_its_own(official, caplog):
    head, folder, arrays = official
    place = "iter.pth" if head == "upernet" else "ours"
    kind = kind_of(load_model(folder / "ours")[2]["config"]["task"])
    config = of_json(kind.needs, load_model(folder / "ours")[2]["config"])
    config.eval_only = False
    task = task_of(config)(config, ("cat", "dog"))
    weights = task.load(folder / place)
    fresh, told = split(task.build_model()).params, {row.ours: row for row in table(task.model)}
    assert weights.params.keys() == fresh.keys()
    anew = set()
    for path, array in weights.params.items():
        given = arrays[told[path].official]
        if told[path].layout.to_official(array).shape == given.shape:
            np.testing.assert_array_equal(told[path].layout.to_official(array), given)
        else:
            np.testing.assert_array_equal(array, fresh[path])
            anew.add(told[path].official.rpartition(".")[0])
    assert anew == (
        {"decode_head.conv_seg", "auxiliary_head.conv_seg"} if head == "upernet" else {"bbox_head.retina_cls"}
    )
    assert f"the layers of {head} with evmamba_t that tell them start anew" in caplog.text
    config.eval_only = True
    with pytest.raises(UserError, match=f"{head} with evmamba_t"):
        task.load(folder / place)


def test_options_reach_heads_backbone_and_data(official, capsys):
    head, folder, _ = official
    given = {"ema": False, **OPTIONS}
    task = open_composed(folder / "iter.pth", f"{head}:evmamba_t", **given, **{"data.scale": (640, 480)}).task
    assert task.data.scale == (640, 480)
    with pytest.raises(UserError, match="unknown option 'data.scales', did you mean 'scale'"):
        open_composed(folder / "ours", **{"data.scales": (640, 480)})
    with pytest.raises(UserError, match="unknown option 'widht', did you mean 'width'.*backbone.NAME"):
        open_composed(folder / "iter.pth", f"{head}:evmamba_t", **given, widht=3)


def test_vims_detector_is_read_off_its_file(tmp_path):
    options = {"depth": 1, "width": 8, "d_state": 2, "image_size": 64}
    about = {"backbone": "vim_t", "num_classes": 7, "width": 12, "fc_width": 20, "backbone_options": options}
    arrays = weights_of(nnx.eval_shape(lambda: create_detector("vim_cascade", **about)))
    save_pth(tmp_path / "model_final.pth", {"model": arrays, "iteration": 184_374})
    given = {f"backbone.{name}": value for name, value in options.items()}
    opened = open_composed(tmp_path / "model_final.pth", "vim_cascade:vim_t", **given)
    assert (opened.task.about.width, opened.task.about.fc_width, len(opened.task.class_names)) == (12, 20, 7)
    back = to_torch(opened.model)
    chex.assert_trees_all_equal({name: back[name] for name in arrays}, arrays)


def test_vim_is_tested_by_windows_as_the_official_segmenters_test_it(tmp_path):
    options = {"depth": 4, "width": 8, "d_state": 2}
    backbone = {"backbone": "vim_t", "backbone_options": {**options, "image_size": 512}}
    model = nnx.eval_shape(lambda: create_segmenter("upernet", width=8, **backbone))
    save_pth(tmp_path / "vim.pth", {"state_dict": weights_of(model)})
    task = open_composed(
        tmp_path / "vim.pth", "upernet:vim_t", **{f"backbone.{name}": value for name, value in options.items()}
    ).task
    assert (task.data.test, task.data.image_size, task.data.test_stride) == ("slide", 512, 341)
