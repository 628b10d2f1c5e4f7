"""CPU time of images on their way from file to batch: ours, timm's transforms with PyTorch's loader, tf.data.

Each pipeline works in a process of its own and, where named, its own environment, on the same JPEGs, which this script
makes. A figure is CPU time, user and system, of that process and its workers; the processes take turns, a fraction of a
second each, so that whatever else the machine does meets all alike. Ratios are medians over the rounds, each between
neighbours in time. Linux only.

    python benchmarks/input_pipeline.py [--timm PYTHON] [--tf PYTHON] [--rounds 15] [--out FILE]

PYTHON is the interpreter of an environment, made with

    pip install timm torch torchvision "pillow<13"
    pip install tensorflow-cpu

(timm 1.0.31 stops on Pillow 13: it posterizes to 0 bits). A peer that is not named is left out.
"""

import argparse
import base64
import contextlib
import importlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from evmamba_jax.measuring.servers import Server

IMAGES, BATCH, SIDE = 320, 64, 224
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
BOX = (37, 61, 251, 333)  # top, left, height, width: one crop whose pixels are compared

# (heading, images a turn, {name: (environment, what it is called there)}); ours first.
WORK = [
    (
        "decode",
        160,
        {
            "ours": ("ours", "decode"),
            "timm": ("timm", "decode"),
            "tf": ("tf", "decode"),
            "tf, its default decoding": ("tf", "decode fast"),
        },
    ),
    (
        "decode, RandomResizedCrop, flip",
        160,
        {
            "ours": ("ours", "crop"),
            "timm, uint8": ("timm", "crop"),
            "tf": ("tf", "crop"),
            "tf, its default decoding": ("tf", "crop fast"),
        },
    ),
    (
        f"the same and RandAugment, {RAND_AUGMENT}",
        160,
        {
            "ours": ("ours", "augment"),
            "timm, uint8": ("timm", "augment"),
            "timm, normalised float32": ("timm", "augment float"),
        },
    ),
    (
        "batches, without RandAugment",
        5 * BATCH,
        {
            "ours, 2 threads": ("ours", "load crop threads"),
            "ours, 2 workers": ("ours", "load crop workers"),
            "timm, uint8, DataLoader, 2 workers": ("timm", "load crop"),
            "tf.data, 2 threads": ("tf", "load crop"),
            "tf.data, 2 threads, its default decoding": ("tf", "load crop fast"),
        },
    ),
    (
        "batches, with RandAugment",
        5 * BATCH,
        {
            "ours, 2 threads": ("ours", "load augment threads"),
            "ours, 2 workers": ("ours", "load augment workers"),
            "timm, uint8, DataLoader, 2 workers": ("timm", "load augment"),
            "timm, float32, DataLoader, 2 workers": ("timm", "load augment float"),
        },
    ),
    (
        "batches of each recipe, ours, 2 threads",
        5 * BATCH,
        {
            "VMamba, MSVMamba": ("ours", "load recipe vmamba_t"),
            "EfficientVMamba": ("ours", "load recipe evmamba_t"),
            "MambaVision": ("ours", "load recipe mambavision_t"),
            "Vim": ("ours", "load recipe vim_t"),
        },
    ),
]


def make_images(folder: Path) -> int:
    """Write photographs, cut and resized to ImageNet's usual 500 x 375, as files and as array_record; return bytes."""
    import numpy as np
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image
    from sklearn.datasets import load_sample_image
    from tensorflow_datasets.proto import tf_example_pb2

    rng, total = np.random.default_rng(0), 0
    writer = ArrayRecordWriter(str(folder / "images.array_record"), "group_size:1")
    for label, name in enumerate(("china", "flower")):
        photograph = Image.fromarray(load_sample_image(f"{name}.jpg"))
        (folder / "files" / name).mkdir(parents=True)
        for index in range(IMAGES // 2):
            width = int(rng.integers(500, 570))
            height = width * 3 // 4
            left, top = int(rng.integers(640 - width + 1)), int(rng.integers(427 - height + 1))
            image = photograph.crop((left, top, left + width, top + height))
            buffer = io.BytesIO()
            image.resize((500, 375), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=98 if label else 97)
            data = buffer.getvalue()
            (folder / "files" / name / f"{index:03}.jpg").write_bytes(data)
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(data)
            example.features.feature["label"].int64_list.value.append(label)
            writer.write(example.SerializeToString())
            total += len(data)
    writer.close()
    return total


# --- The three pipelines ---------------------------------------------------------------------------------------------
# Each is a function of the folder and of what is asked for. It returns an endless iterator: a step does one image or
# one batch. For "pixels" it returns a decoded image and a resized crop of it.


def encoded(folder):
    files = [path.read_bytes() for path in sorted((folder / "files").glob("*/*.jpg"))]
    return [files[i // 2 + i % 2 * (len(files) // 2)] for i in range(len(files))]  # both kinds in turn


class AsManyAsImageNet:
    """A few records again and again: Grain shuffles an index among a million faster than one among hundreds."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return 1_281_167

    def __getitem__(self, index):
        return self.records[index % len(self.records)]


def ours(folder, what):
    import itertools

    import numpy as np
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from PIL import Image

    from evmamba_jax.data import transforms
    from evmamba_jax.data.config import DataConfig
    from evmamba_jax.data.loader import train_batches
    from evmamba_jax.data.sources import Source

    kind, _, how = what.partition(" ")
    config = DataConfig(auto_augment=RAND_AUGMENT if "augment" in what else "")
    if kind == "load":
        if how.startswith("recipe"):
            config = importlib.import_module(f"configs.{how.split()[1]}").get_config().data
        config.num_threads = 2
        records = AsManyAsImageNet(ArrayRecordDataSource(str(folder / "images.array_record")))
        source = Source(name="photographs", split="train", class_names=("china", "flower"), records=records)
        if "workers" in how:
            config.num_workers, config.num_threads = 2, 1
        return train_batches(config, source, seed=0, global_batch=BATCH)
    files, rng = encoded(folder), np.random.default_rng(0)
    if what == "pixels":
        pixels = transforms.decode(files[0], 3)
        top, left, height, width = BOX
        image = Image.fromarray(np.ascontiguousarray(pixels[top : top + height, left : left + width]))
        return pixels, np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    if what == "decode":
        return (transforms.decode(data, 3) for data in itertools.cycle(files))
    return (transforms.train_image(data, config, rng) for data in itertools.cycle(files))


def timm(folder, what):
    import itertools

    import numpy as np
    import torch
    from PIL import Image
    from timm.data import ImageDataset, create_transform
    from timm.data.loader import fast_collate

    torch.set_num_threads(1)

    def decode(data):
        return Image.open(io.BytesIO(data)).convert("RGB")

    transform = create_transform(
        SIDE,
        is_training=True,
        color_jitter=None,
        auto_augment=RAND_AUGMENT if "augment" in what else None,
        interpolation="bicubic",
        use_prefetcher="float" not in what,  # whose batches are uint8, and normalised on the device
    )
    if what.startswith("load"):
        dataset = ImageDataset(str(folder / "files"), transform=transform)
        sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**9)
        collate = None if "float" in what else fast_collate
        loader = torch.utils.data.DataLoader(dataset, BATCH, sampler=sampler, num_workers=2, collate_fn=collate)
        return iter(loader)
    files = encoded(folder)
    if what == "pixels":
        image = decode(files[0])
        top, left, height, width = BOX
        box = (left, top, left + width, top + height)
        return np.asarray(image), np.asarray(image.crop(box).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    if what == "decode":
        return (decode(data) for data in itertools.cycle(files))
    return (transform(decode(data)) for data in itertools.cycle(files))


def tf(folder, what):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    import tensorflow as tf

    def resize(pixels):
        resized = tf.image.resize(pixels, (SIDE, SIDE), tf.image.ResizeMethod.BICUBIC, antialias=True)
        return tf.saturate_cast(tf.round(resized), tf.uint8)

    def crop(data):
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            tf.zeros((1, 0, 4)),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        box = tf.stack([begin[0], begin[1], size[0], size[1]])
        return tf.image.random_flip_left_right(
            resize(tf.image.decode_and_crop_jpeg(data, box, channels=3, dct_method=method))
        )

    # By default TensorFlow trades exactness for speed; this is the arithmetic of the other two.
    method = "" if "fast" in what else "INTEGER_ACCURATE"
    threads = 2 if what.startswith("load") else 1
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.autotune.enabled = False  # it would read further ahead, in the time of others
    options.experimental_optimization.inject_prefetch = False
    if what.startswith("load"):
        paths = sorted(map(str, (folder / "files").glob("*/*.jpg")))
        labels = [int("flower" in path) for path in paths]
        data = tf.data.Dataset.from_tensor_slices((paths, labels)).shuffle(len(paths)).repeat()
        data = data.map(lambda path, label: (crop(tf.io.read_file(path)), label), num_parallel_calls=threads)
        return data.batch(BATCH).prefetch(2).with_options(options).as_numpy_iterator()
    files = encoded(folder)
    if what == "pixels":
        pixels = tf.io.decode_jpeg(files[0], channels=3, dct_method=method)
        return pixels.numpy(), resize(
            tf.image.decode_and_crop_jpeg(files[0], BOX, channels=3, dct_method=method)
        ).numpy()
    decode = crop if "crop" in what else lambda data: tf.io.decode_jpeg(data, channels=3, dct_method=method)
    data = tf.data.Dataset.from_tensor_slices(files).repeat().map(decode).with_options(options)
    return iter(data)


# --- Measuring --------------------------------------------------------------------------------------------------------


def family() -> list[int]:
    """Return this process and its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    members = [os.getpid()]
    for member in members:
        members += [child for child, parent in parents.items() if parent == member]
    return members


def cpu_seconds(members: list[int]) -> float:
    """Return user and system time; the system counts other processes in hundredths of a second."""
    ticks = 0
    for member in members[1:]:
        ticks += sum(map(int, Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def memory(members: list[int]) -> float:
    """Return MiB in memory; what processes share is counted once."""
    total = 0
    for member in members:
        lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def serve(environment: str, folder: Path) -> None:
    """Answer requests, a line of JSON each, until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply
    open_ = {"ours": ours, "timm": timm, "tf": tf}[environment]
    running = {}
    for line in sys.stdin:
        request = json.loads(line)
        what, reply = request["what"], {}
        if what == "versions":
            names = {"ours": ("simplejpeg", "pillow", "grain", "array_record"), "timm": ("timm", "torch", "pillow")}
            packages = names.get(environment, ("tensorflow_cpu",))
            reply = {"versions": ", ".join(f"{name} {version(name)}" for name in packages)}
        elif what == "pixels":
            reply = {"pixels": [base64.b64encode(array.tobytes()).decode() for array in open_(folder, what)]}
        else:
            images = BATCH if what.startswith("load") else 1
            if what not in running:
                running[what] = open_(folder, what)
            steps = running[what]
            for _ in range(8 if images > 1 else 3):  # what was read ahead while others had their turn; warm caches
                next(steps)
            members = family()
            before = cpu_seconds(members)
            for _ in range(request["images"] // images):
                next(steps)
            reply = {"ms": 1e3 * (cpu_seconds(members) - before) / request["images"]}
            if images > 1:
                reply["memory"] = memory(members)
                quiet(members)
        print(json.dumps(reply), file=replies, flush=True)


def quiet(members: list[int]) -> None:
    """Wait until a loader has read ahead as far as it will, which would disturb the next in turn."""
    while True:
        before = cpu_seconds(members)
        time.sleep(0.3)
        if cpu_seconds(members) - before < 0.03:
            return


def start(python: str, environment: str, folder: Path) -> Server:
    """Start the process that measures an environment."""
    command = [python, __file__, "--serve", environment, str(folder)]
    return Server(command, os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})


def measure(pythons: dict[str, str], folder: Path, rounds: int, out: Path | None) -> None:
    """Fill the report."""
    from evmamba_jax.measuring import machine
    from evmamba_jax.measuring.document import Report

    total = make_images(folder)
    versions = machine.versions("Python")
    report = Report(
        "Images from file to batch: CPU time", out, machine=machine.cpu(), versions=versions, date=machine.today()
    )
    report.text(
        f"{IMAGES} JPEGs of 500 x 375, {total / IMAGES / 1e3:.0f} kB on average; crops of {SIDE} x {SIDE}, bicubic; "
        f"batches of {BATCH}. CPU time, user and system, of the process and its workers: median of {rounds} rounds, in "
        "which the pipelines take turns. Ratio: the row's time over the first row's, median of the rounds: how "
        "many times as many images the first does. Memory: of the process and its workers with all their libraries; "
        "what they share is counted once. Written by `benchmarks/input_pipeline.py`."
    )
    direct = {name: start(python, name, folder) for name, python in pythons.items()}
    report.text("\n".join(f"- {name}: {server.ask(what='versions')['versions']}" for name, server in direct.items()))
    pixels = {
        name: [base64.b64decode(array) for array in server.ask(what="pixels")["pixels"]]
        for name, server in direct.items()
    }
    for name in [name for name in pythons if name != "ours"]:
        differences = [
            max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in zip(pixels["ours"], pixels[name], strict=True)
        ]
        report.text(
            f"Pixels of one image, ours against {name}: decoded, they differ by at most {differences[0]}; "
            f"cut and resized, by at most {differences[1]}."
        )
    for heading, images, everyone in WORK:
        pipelines = {name: call for name, call in everyone.items() if call[0] in pythons}
        loads = any(what.startswith("load") for _, what in pipelines.values())
        # A loader goes on reading by itself and holds memory: each has its own process.
        servers = {
            name: start(pythons[environment], environment, folder) if loads else direct[environment]
            for name, (environment, _) in pipelines.items()
        }
        times: dict[str, list[float]] = {name: [] for name in pipelines}
        held: dict[str, float] = dict.fromkeys(pipelines, 0.0)
        for turn in range(rounds + 1):
            for name, (_, what) in pipelines.items():
                reply = servers[name].ask(what=what, images=images)
                held[name] = max(held[name], reply.get("memory", 0.0))
                if turn:  # the first round warms up
                    times[name].append(reply["ms"])
        if loads:
            for server in servers.values():
                server.close()
        numbers = [("CPU ms an image", "{:.2f}"), ("images per CPU-second", "{:.0f}"), ("ratio", "{:.2f}")]
        report.table(heading, *numbers, *[("memory, MiB", "{:.0f}")] * loads)
        base = times[next(iter(pipelines))]
        for name, mine in times.items():
            ratio = statistics.median(theirs / own for theirs, own in zip(mine, base, strict=True))
            median = statistics.median(mine)
            report.row(name, median, 1e3 / median, ratio, *[held[name]] * loads)
    for server in direct.values():
        server.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timm", help="interpreter of an environment with timm and torch")
    parser.add_argument("--tf", help="interpreter of an environment with TensorFlow")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each pipeline (default 15)")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve[0], Path(options.serve[1]))
    pythons = {"ours": sys.executable, "timm": options.timm, "tf": options.tf}
    pythons = {name: python for name, python in pythons.items() if python}
    with tempfile.TemporaryDirectory() as folder:
        measure(pythons, Path(folder), options.rounds, options.out)


if __name__ == "__main__":
    main()
