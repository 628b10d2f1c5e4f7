"""CPU time of images with label maps or boxes, from storage to example: ours, mmsegmentation's and mmdetection's.

Ours reads records that ``python -m evmamba_jax.data prepare`` wrote, theirs the same JPEG, PNG and JSON files through
their own data set classes, all in the page cache. Theirs end with their packing to tensors, ours with padding to the
shape of the batch. Each works in a process and an environment of its own, on one thread; a figure is its CPU time, user
and system. The two take turns, so that whatever else the machine does meets both alike. Ratios are medians over the
rounds, each between neighbours in time. What draws decide is drawn by each for itself, over many images.

    python benchmarks/dense_pipelines.py --mm PYTHON [--rounds 15] [--out FILE]

PYTHON is the interpreter of an environment, made with

    pip install torch torchvision "numpy<2" mmengine==0.10.7 mmcv-lite==2.1.0 "opencv-python-headless<4.12"
    pip install --no-deps mmsegmentation==1.2.2 mmdet==3.3.0
    pip install scipy pycocotools shapely terminaltables prettytable ftfy regex matplotlib

mmcv's compiled operations, which mmcv-lite lacks, are imported but used by none of these pipelines; they are stubs.
"""

import argparse
import importlib.abc
import importlib.machinery
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from importlib.metadata import version
from pathlib import Path

from evmamba_jax.measuring.servers import Server, answer

IMAGES = 24
BOXES_SIZE, LABELS_SIZE = (480, 640), (512, 683)  # height, width: COCO's and ADE20K's most frequent
OBJECTS, CLASSES, JPEG_QUALITY = 7, 150, 90

# (what, images a turn)
PIPELINES = [
    ("segmentation, training", 48),
    ("segmentation, test", 24),
    ("detection 1x, training", 24),
    ("detection 3x, training", 48),
    ("detection, test", 24),
]
# Parts of them, of the images for detection.
PARTS = [("decode", 48), (RESIZE := "resize to (1333, 800)", 24), (SATURATION := "saturation changed by 0.73", 24)]
# What is compared, pixel by pixel.
LIMITS = {"detection": (1333, 800), "segmentation": (2048, 512)}
CHANGES = {"brightness": 17.6, "contrast": 1.37, "saturation": 0.73, "hue": -11}


def make_files(folder: Path) -> None:
    """Write photographs, label maps and boxes as mmsegmentation and mmdetection read them."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")]

    def write(index: int, size: tuple[int, int], path: Path) -> None:
        """Write a part of a photograph, sharp as one from a camera: twice its pixels, with noise, made smaller."""
        height, width = size
        photograph = photographs[index % 2]
        cut_width = int(rng.integers(380, photograph.width))
        cut_height = min(cut_width * height // width, photograph.height)
        left, top = (
            int(rng.integers(old - new + 1)) for old, new in zip(photograph.size, (cut_width, cut_height), strict=True)
        )
        cut = photograph.crop((left, top, left + cut_width, top + cut_height))
        pixels = np.asarray(cut.resize((2 * width, 2 * height), Image.Resampling.LANCZOS), np.float32)
        noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).resize((width, height), Image.Resampling.BOX).save(path, quality=JPEG_QUALITY)

    for name in ("boxes", "labels/images", "labels/annotations"):
        (folder / name).mkdir(parents=True)
    images, objects = [], []
    for index in range(IMAGES):
        height, width = BOXES_SIZE
        write(index, BOXES_SIZE, folder / f"boxes/{index:03}.jpg")
        images.append({"id": index, "file_name": f"{index:03}.jpg", "height": height, "width": width})
        for _ in range(OBJECTS):
            w, h = int(rng.integers(20, 300)), int(rng.integers(20, 240))
            box = [int(rng.integers(width - w)), int(rng.integers(height - h)), w, h]
            objects.append({"id": len(objects), "image_id": index, "category_id": int(rng.integers(3)), "bbox": box})
            objects[-1] |= {"area": w * h, "iscrowd": 0}
        write(index, LABELS_SIZE, folder / f"labels/images/{index:03}.jpg")
        # Regions: the nearest of some points, with ragged borders.
        y, x = np.mgrid[: LABELS_SIZE[0], : LABELS_SIZE[1]] + rng.normal(0, 1.5, (2, *LABELS_SIZE))
        points = rng.uniform(0, LABELS_SIZE, (12, 2))
        nearest = np.argmin([(y - py) ** 2 + (x - px) ** 2 for py, px in points], 0)
        labels = rng.integers(0, CLASSES + 1, len(points)).astype(np.uint8)[nearest]
        Image.fromarray(labels).save(folder / f"labels/annotations/{index:03}.png")
    categories = [{"id": i, "name": f"class {i}"} for i in range(3)]
    document = {"images": images, "annotations": objects, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(document))
    (folder / "classes.txt").write_text("".join(f"class {i}\n" for i in range(CLASSES)))


def prepare(folder: Path) -> None:
    """Write the same as our records."""
    ours = [sys.executable, "-m", "evmamba_jax.data", "prepare"]
    to = ["--data-dir", str(folder / "prepared")]
    boxes, labels = (folder / "boxes", folder / "boxes.json"), (folder / "labels/images", folder / "labels/annotations")
    classes = "--classes", folder / "classes.txt", "--ignore-zero"
    for command in (
        ["boxes", "--name", "boxes", "--train", *boxes, "--val", *boxes],
        ["label_maps", "--name", "labels", "--train", *labels, "--val", *labels, *classes],
    ):
        subprocess.run([*ours, *map(str, command), *to], env=environment(), check=True, capture_output=True)


# --- The two sides ----------------------------------------------------------------------------------------------------
# Each is a class. ``steps(what)`` iterates without end, and each step makes one example. ``pixels(request)`` yields
# images (H, W, 3), red first. The other side has to give the same.


class Ours:
    """This package."""

    packages = "numpy", "pillow", "simplejpeg", "opencv-python-headless"

    def __init__(self, folder: Path):
        from evmamba_jax.data.dense import open_dense
        from evmamba_jax.data.dense_config import DetectionData, SegmentationData
        from evmamba_jax.data.mmdet import BoxedImages
        from evmamba_jax.data.mmseg import LabelMaps

        self.labels, self.boxes = (open_dense(name, folder / "prepared", "train") for name in ("labels", "boxes"))
        self.segmentation = LabelMaps(SegmentationData())
        self.detection, self.multi_scale = (
            BoxedImages(DetectionData(augment=augment)) for augment in ("one_scale", "multi_scale")
        )

    def parts(self) -> dict:
        """Return functions of a file's bytes, or of the decoded image."""
        from evmamba_jax.data import opencv
        from evmamba_jax.data.decoding import decode

        return {
            "decode": lambda data: decode(data, 3, upright=True),
            RESIZE: lambda image: opencv.resize_bilinear(image, 800, 1067),
            SATURATION: lambda image: opencv.adjust_saturation(image, CHANGES["saturation"], red_first=True),
        }

    def steps(self, what: str):
        import numpy as np

        task, _, phase = what.partition(", ")
        split = self.labels if task == "segmentation" else self.boxes
        reader = {"segmentation": self.segmentation, "detection 3x": self.multi_scale}.get(task, self.detection)
        rng = np.random.default_rng(0)
        for index in itertools.cycle(range(IMAGES)):
            decoded = reader.decode(split[index])
            yield reader.evaluate(decoded) if phase == "test" else reader.train(decoded, rng)

    def pixels(self, request: dict):
        from evmamba_jax.data import opencv
        from evmamba_jax.data.mmdet import Geometry, change

        task, kind = request["task"], request["kind"]
        reader, split = (self.detection, self.boxes) if task == "detection" else (self.segmentation, self.labels)
        for index in range(IMAGES):
            record = split[index]
            image = reader.decode(record)[0]
            size = opencv.keep_ratio_size(*image.shape[:2], request.get("limits", (1, 1)))
            if kind == "decoded":
                yield image
            elif kind == "test":
                example = reader.evaluate(reader.decode(record))
                yield example["image"][tuple(map(slice, example["size"]))]
            elif kind == "window":
                yield opencv.resize_bilinear(image, *size, opencv.Window(*request["window"]))
            elif kind == "crop":
                before = opencv.keep_ratio_size(*image.shape[:2], request["before"])
                window = opencv.Window(*request["window"])
                cut = window.bottom - window.top, window.right - window.left
                size = opencv.keep_ratio_size(*cut, request["limits"])
                yield change(
                    image, record["boxes"], Geometry("first" if request["flip"] else "", before, window, size)
                )[0]
            elif kind == "mirrored":
                yield change(image, record["boxes"], Geometry("last", None, None, size))[0]
            else:
                adjust = getattr(opencv, f"adjust_{kind}")
                yield adjust(image[..., ::-1], request["value"])[..., ::-1]


class Stub(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a stub in place of ``mmcv.ops``."""

    def find_spec(self, name, path, target=None):
        if name == "mmcv.ops" or name.startswith("mmcv.ops."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


class Theirs:
    """mmsegmentation and mmdetection, with the pipelines of their ADE20K and COCO configurations."""

    packages = "mmsegmentation", "mmdet", "mmcv-lite", "mmengine", "opencv-python-headless", "torch", "numpy", "pillow"

    def __init__(self, folder: Path):
        import warnings

        sys.meta_path.insert(0, Stubs())
        warnings.simplefilter("ignore")
        import cv2
        import torch

        cv2.setNumThreads(0)
        torch.set_num_threads(1)
        self.folder = folder

    def parts(self) -> dict:
        """Return functions of a file's bytes, or of the decoded image."""
        import mmcv
        from mmseg.datasets.transforms import PhotoMetricDistortion

        def saturation(image):
            hsv = mmcv.bgr2hsv(image)
            hsv[:, :, 1] = PhotoMetricDistortion().convert(hsv[:, :, 1], alpha=CHANGES["saturation"])
            return mmcv.hsv2bgr(hsv)

        return {
            "decode": mmcv.imfrombytes,
            RESIZE: lambda image: mmcv.imrescale(image, (1333, 800)),
            SATURATION: saturation,
        }

    def steps(self, what: str):
        from mmengine.registry import init_default_scope

        segmentation = what.startswith("segmentation")
        init_default_scope("mmseg" if segmentation else "mmdet")
        dataset = self.segmentation(what) if segmentation else self.detection(what)
        return (dataset[index] for index in itertools.cycle(range(IMAGES)))

    def segmentation(self, what: str):
        """Return the data set of ``configs/_base_/datasets/ade20k.py``."""
        from mmseg.datasets import BaseSegDataset

        load, labels = {"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "reduce_zero_label": True}
        test = [load, {"type": "Resize", "scale": (2048, 512), "keep_ratio": True}, labels]
        training = [
            load,
            labels,
            {"type": "RandomResize", "scale": (2048, 512), "ratio_range": (0.5, 2.0), "keep_ratio": True},
            {"type": "RandomCrop", "crop_size": (512, 512), "cat_max_ratio": 0.75},
            {"type": "RandomFlip", "prob": 0.5},
            {"type": "PhotoMetricDistortion"},
        ]
        return BaseSegDataset(
            data_root=str(self.folder / "labels"),
            data_prefix={"img_path": "images", "seg_map_path": "annotations"},
            metainfo={"classes": [f"class {i}" for i in range(CLASSES)]},
            reduce_zero_label=True,
            pipeline=[*(test if what.endswith("test") else training), {"type": "PackSegInputs"}],
            test_mode=what.endswith("test"),
        )

    def detection(self, what: str):
        """Return the data set of ``configs/_base_/datasets/coco_detection.py``, or of Swin's 3x without masks."""
        from mmdet.datasets import CocoDataset

        load, boxes = {"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}
        resize, flip = {"type": "Resize", "scale": (1333, 800), "keep_ratio": True}, {"type": "RandomFlip", "prob": 0.5}

        def one_of(*short: int) -> dict:
            return {"type": "RandomChoiceResize", "scales": [(side, 1333) for side in short], "keep_ratio": True}

        crop = {"type": "RandomCrop", "crop_type": "absolute_range", "crop_size": (384, 600)}
        crop["allow_negative_crop"] = True
        last = one_of(*range(480, 801, 32))
        ways = {"type": "RandomChoice", "transforms": [[last], [one_of(400, 500, 600), crop, last]]}
        pipeline = {
            "detection 1x, training": [load, boxes, resize, flip, {"type": "PackDetInputs"}],
            "detection 3x, training": [load, boxes, flip, ways, {"type": "PackDetInputs"}],
        }
        keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
        test = [load, resize, boxes, {"type": "PackDetInputs", "meta_keys": keys}]
        return CocoDataset(
            data_root=str(self.folder),
            ann_file="boxes.json",
            data_prefix={"img": "boxes/"},
            metainfo={"classes": [f"class {i}" for i in range(3)]},
            pipeline=pipeline.get(what, test),
            test_mode=what.endswith("test"),
        )

    def pixels(self, request: dict):
        import mmcv

        task, kind = request["task"], request["kind"]
        tests = self.steps(f"{task}, test")
        for index in range(IMAGES):
            place = "boxes" if task == "detection" else "labels/images"
            image = mmcv.imread(str(self.folder / f"{place}/{index:03}.jpg"))
            if kind == "decoded":
                changed = image
            elif kind == "test":
                yield next(tests)["inputs"].numpy().transpose(1, 2, 0)[..., ::-1]
                continue
            elif kind == "window":
                top, left, bottom, right = request["window"]
                changed = mmcv.imrescale(image, tuple(request["limits"]))[top:bottom, left:right]
            elif kind == "crop":
                top, left, bottom, right = request["window"]
                image = mmcv.imflip(image) if request["flip"] else image
                cut = mmcv.imrescale(image, tuple(request["before"]))[top:bottom, left:right]
                changed = mmcv.imrescale(cut, tuple(request["limits"]))
            elif kind == "mirrored":
                changed = mmcv.imflip(mmcv.imrescale(image, tuple(request["limits"])))
            else:
                changed = self.distorted(image, kind, request["value"])
            yield changed[..., ::-1]

    @staticmethod
    def distorted(image, kind: str, value: float):
        """Return what one of ``PhotoMetricDistortion``'s methods returns for a value that it would draw."""
        from unittest import mock

        from mmseg.datasets.transforms import PhotoMetricDistortion
        from mmseg.datasets.transforms import transforms as module

        numbers = mock.Mock(uniform=lambda *_: value)
        # Its first draw says whether, its other one says by how much.
        numbers.randint.side_effect = [1, value]
        with mock.patch.object(module, "random", numbers):
            return getattr(PhotoMetricDistortion(), kind)(image)


# --- Measuring --------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return the variables of all processes: one thread for every library."""
    root = str(Path(__file__).parent.parent)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"} | threads


def serve(side: str, folder: Path) -> None:
    """Answer requests until the input ends."""
    mine = {"ours": Ours, "theirs": Theirs}[side](folder)
    running = {}

    def reply(request: dict) -> dict:
        what = request["what"]
        if what == "versions":
            return {"versions": {name: version(name) for name in mine.packages}}
        if what == "pixels":
            import numpy as np

            path = folder / f"{side}.npz"
            np.savez(path, *mine.pixels(request))
            return {"path": str(path)}
        if what not in running:
            running[what] = part_steps(mine, folder, what) if what in dict(PARTS) else mine.steps(what)
        steps = running[what]
        for _ in range(3):  # warm caches
            next(steps)
        before = time.process_time()
        for _ in range(request["images"]):
            next(steps)
        return {"ms": 1e3 * (time.process_time() - before) / request["images"]}

    answer(reply)


def part_steps(side, folder: Path, what: str):
    """Return an endless iterator. Each step does one part of the work for an image."""
    parts = side.parts()
    inputs = [path.read_bytes() for path in sorted((folder / "boxes").glob("*.jpg"))]
    if what != "decode":
        inputs = list(map(parts["decode"], inputs))
    return map(parts[what], itertools.cycle(inputs))


def comparisons():
    """Yield what is compared, in words, and the request."""
    for task, limits in LIMITS.items():
        yield f"{task}: decoded", {"task": task, "kind": "decoded"}
        yield f"{task}: the test's image, {limits}", {"task": task, "kind": "test"}
    window = {"kind": "window", "task": "segmentation", "limits": (3481, 870), "window": (201, 333, 713, 845)}
    yield "segmentation: a window of 512 x 512 of the image resized to (3481, 870)", window
    yield "segmentation: the same at (1024, 256)", window | {"limits": (1024, 256), "window": (0, 0, 256, 342)}
    for kind, value in CHANGES.items():
        yield f"segmentation: {kind} changed by {value}", {"task": "segmentation", "kind": kind, "value": value}
    crop = {"kind": "crop", "task": "detection", "before": (1333, 500), "window": (61, 37, 451, 622)}
    crop |= {"limits": (1333, 736), "flip": True}
    yield "detection 3x: mirrored, resized to (1333, 500), cropped, resized to (1333, 736)", crop
    mirrored = {"kind": "mirrored", "task": "detection", "limits": LIMITS["detection"]}
    yield f"detection 1x: resized to {LIMITS['detection']} and mirrored", mirrored


def differing(one: str, other: str) -> tuple[int, int, int]:
    """Return how many pixels of two files of images differ, of how many, and by how much at most."""
    import numpy as np

    differ = pixels = most = 0
    with np.load(one) as mine, np.load(other) as theirs:
        for name in mine:
            difference = np.abs(mine[name].astype(int) - theirs[name]).max(-1)
            differ, pixels = differ + int(np.count_nonzero(difference)), pixels + difference.size
            most = max(most, int(difference.max()))
    return differ, pixels, most


def measure(python: str, folder: Path, rounds: int, out: Path | None) -> None:
    """Fill the report."""
    from evmamba_jax.measuring import machine
    from evmamba_jax.measuring.document import Report

    make_files(folder)
    prepare(folder)
    environment_ = {"machine": machine.cpu(), "versions": machine.versions("Python"), "date": machine.today()}
    report = Report("Images with label maps and boxes, from storage to example: CPU time", out, **environment_)
    sizes = [sum(path.stat().st_size for path in (folder / name).glob("*.jpg")) for name in ("boxes", "labels/images")]
    report.text(
        f"{IMAGES} JPEGs of 640 x 480 ({sizes[0] / IMAGES / 1e3:.0f} kB on average) with {OBJECTS} boxes each, and "
        f"{IMAGES} of 683 x 512 ({sizes[1] / IMAGES / 1e3:.0f} kB) with label maps of twelve regions, quality "
        f"{JPEG_QUALITY}. CPU time, user and system, on one thread: median of {rounds} rounds, in which the two take "
        "turns. Ratio: theirs over ours, median of the rounds: how many times as many images ours does. Images of "
        "683 x 512 have the size of the segmentation test already and are not resized there. Written by "
        "`benchmarks/dense_pipelines.py`."
    )
    pythons = {"ours": sys.executable, "theirs": python}
    serve = lambda side: [pythons[side], __file__, "--serve", side, str(folder)]  # noqa: E731
    servers = {side: Server(serve(side), environment()) for side in pythons}
    told = {side: server.ask(what="versions")["versions"] for side, server in servers.items()}
    lines = [f"- {side}: {', '.join(map(' '.join, found.items()))}" for side, found in told.items()]
    report.text("\n".join(lines))
    report.table("what is compared, all images", *((name, "{:,}") for name in ("pixels that differ", "of", "at most")))
    for words, request in comparisons():
        paths = [server.ask(what="pixels", **request)["path"] for server in servers.values()]
        report.row(words, *differing(*paths))
    times = {what: {side: [] for side in servers} for what, _ in PIPELINES + PARTS}
    for turn in range(rounds + 1):
        for what, images in PIPELINES + PARTS:
            for side, server in servers.items():
                milliseconds = server.ask(what=what, images=images)["ms"]
                if turn:  # the first round warms up
                    times[what][side].append(milliseconds)
    names = "ours, CPU ms an image", "theirs", "ours, images per CPU-second", "theirs", "ratio"
    for heading, work in (("pipeline", PIPELINES), ("part, images of 640 x 480", PARTS)):
        report.table(heading, *zip(names, ("{:.2f}", "{:.2f}", "{:.0f}", "{:.0f}", "{:.2f}"), strict=True))
        for what, _ in work:
            both = times[what]
            medians = [statistics.median(values) for values in both.values()]
            ratio = statistics.median(b / a for a, b in zip(both["ours"], both["theirs"], strict=True))
            report.row(what, *medians, *(1e3 / median for median in medians), ratio)
    for server in servers.values():
        server.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mm", help="interpreter of an environment with mmsegmentation and mmdetection")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each pipeline (default 15)")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve[0], Path(options.serve[1]))
    if not options.mm:
        parser.error("--mm is needed")
    with tempfile.TemporaryDirectory() as folder:
        measure(options.mm, Path(folder), options.rounds, options.out)


if __name__ == "__main__":
    main()
