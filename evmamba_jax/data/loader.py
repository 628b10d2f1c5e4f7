"""Batches for training and evaluation, from a source through Grain.

The step number is the whole state of the input: batch ``step`` is a pure function of (seed, global batch, step),
whatever the number of hosts, threads and worker processes, so resuming needs nothing but that number.
"""

import dataclasses
import functools
import itertools
import math
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.decoding import CorruptImageError
from evmamba_jax.data.readers import Example, LabelledImages, Reader, Shape
from evmamba_jax.data.sources import Split, labels_of
from evmamba_jax.data.workers import Ledger, begin
from evmamba_jax.errors import UserError, printable

Batch = Mapping[str, np.ndarray]


# A batch is built in parts of at most so many rows. All threads work on the batch that is needed next, so the first one
# comes soon, and reading ahead is bounded in parts, not in batches.
_PART = 32
_GOODBYE = 60.0  # seconds that worker processes have to end by themselves


class Batches(Iterator[Batch]):
    """An iterator over batches that stops its threads and worker processes when closed; also a context manager."""

    def __init__(self, parts: grain.IterDataset, parts_a_batch: int, ledger: Ledger):
        self._iterator: grain.DatasetIterator[Batch] | None = iter(parts)
        self._parts_a_batch = parts_a_batch
        self._ledger = ledger

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise ValueError("these batches are closed: read them before close(), or inside the with block")
        try:
            with self._ledger.waiting():
                parts = [next(self._iterator) for _ in range(self._parts_a_batch)]
        except RuntimeError as error:
            code = re.search(r"exit code (-?\d+)", str(error))
            if not (self._ledger.workers and code):
                raise
            raise UserError(self._ledger.obituary(int(code[1]))) from error
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}

    def close(self) -> None:
        """Stop reading ahead; further calls of ``next`` fail."""
        if self._iterator is None:
            return
        iterator, self._iterator = self._iterator, None
        # Grain would wait for ever for a process that hangs.
        closing = threading.Thread(target=iterator.close, daemon=True)
        closing.start()
        closing.join(_GOODBYE)
        if closing.is_alive():
            self._ledger.kill_workers()
            closing.join(_GOODBYE)
        self._ledger.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def train_batches(
    config: DataConfig,
    source: Split,
    *,
    seed: int,
    global_batch: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    reader: Reader | None = None,
) -> Batches:
    """Read shuffled, augmented batches without end; every epoch has its own order and its own augmentation.

    With ``repeated_aug`` each image comes several times in a row, every time augmented anew, and an epoch, as long as
    ever, shows that many times fewer images.

    Batches run across the ends of epochs: step s holds examples s * global_batch to (s + 1) * global_batch of the
    endless sequence. Process p of n gets rows p * b to (p + 1) * b of each global batch, b = global_batch / n, which is
    the order in which ``jax.make_array_from_process_local_data`` puts them together.

    Args:
        config: reads the host-side fields.
        source: the training split.
        seed: of order and augmentation, 0 to 2**32 - 1.
        global_batch: examples a step over all processes.
        start_step: the first step to read.
        process_index: this process, as in ``jax.process_index()``.
        process_count: number of processes.
        reader: makes the examples; by default, images with labels.

    Returns:
        Iterator over the reader's examples, stacked (``image`` uint8 (b, H, W, C), ``label`` int32 (b,)), and
        ``corrupt`` int32 (b,), the number of unreadable records that were passed over for each example.

    Raises:
        UserError: a batch that cannot be divided, more processes than examples, a bad seed; and from the iterator: an
            unreadable record, named, where ``on_corrupt`` is "error".
    """
    rows = _rows(source, global_batch, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is not allowed: it must be 0 to {2**32 - 1}")
    reader = reader or LabelledImages(config)
    order: grain.MapDataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    if config.balanced:
        order = _Balanced(order, labels_of(source), seed)
    if config.repeated_aug > 1:
        order = _Views(order, len(source), config.repeated_aug)
    ledger = Ledger(config, source)
    if hasattr(reader, "train_shape"):
        order = ByShape(order, source, reader, seed=seed, global_batch=global_batch)
    examples = order.random_map(_TrainExample(config, source, ledger, reader))
    return _read_ahead(_Parts(examples, rows, global_batch, start_step), config, ledger)


def eval_batches(
    config: DataConfig,
    source: Split,
    *,
    global_batch: int,
    process_index: int = 0,
    process_count: int = 1,
    reader: Reader | None = None,
) -> Batches:
    """Read every example exactly once, in order; all processes get the same number of batches.

    Args:
        config: reads the host-side fields.
        source: the evaluation split.
        global_batch: examples a step over all processes.
        process_index: this process, as in ``jax.process_index()``.
        process_count: number of processes.
        reader: makes the examples; by default, images with labels.

    Returns:
        Iterator over ceil(len(source) / global_batch) batches of the reader's examples, stacked (``image`` uint8 (b, H,
        W, C), ``label`` int32 (b,)), with ``weight`` float32 (b,), ``index`` int32 (b,) and ``corrupt`` int32 (b,).
        ``weight`` is 1 where the example counts; it is 0 for the padding of the last batch (``index`` -1) and for
        unreadable records (``corrupt`` 1).

    Raises:
        UserError: as ``train_batches``.
    """
    rows = _rows(source, global_batch, process_index, process_count)
    ledger = Ledger(config, source)
    reader = reader or LabelledImages(config)
    if hasattr(reader, "eval_shape"):
        order = eval_order(source, reader, global_batch)
    else:
        order = [(index, None) for index in range(len(source))]
        order += [(-1, None)] * (-len(source) % global_batch)
    examples = grain.MapDataset.source(order).map(_EvalExample(config, source, ledger, reader))
    return _read_ahead(_Parts(examples, rows, global_batch), config, ledger)


class _Balanced(grain.MapDataset[int]):
    """An order without end that draws a class, each as likely as any other, and then an image of it.

    Source: torch's ``WeightedRandomSampler`` with weights of one over the number of images of the class.
    """

    def __init__(self, order: grain.MapDataset, labels: np.ndarray, seed: int):
        super().__init__(order)
        self._order, self._seed = order, seed
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int):  # pyrefly: ignore[bad-override]
        rng = np.random.default_rng((self._seed, index))
        members = self._members[rng.integers(len(self._members))]
        return int(members[rng.integers(len(members))])


class _Views(grain.MapDataset[int]):
    """Repeated augmentation: each index of an epoch's order several times in a row, cut off at the epoch's length.

    The views differ because what comes after draws by position. An epoch stays as long as it is, and so holds that
    many times fewer images.

    Source: RepeatAugSampler of timm, after DeiT's. There the epoch ends at the last multiple of 256, and neighbours in
    this order go to different devices.
    """

    def __init__(self, order: grain.MapDataset, epoch: int, views: int):
        super().__init__(order)
        self._order, self._epoch, self._views = order, epoch, views

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int):  # pyrefly: ignore[bad-override]
        epoch, position = divmod(index, self._epoch)
        return self._order[epoch * self._epoch + position // self._views]


class Drawn(NamedTuple):
    """An image of an order, with the seed of its own draws and the shape that follows from them."""

    index: int
    seed: tuple[int, int]
    shape: Shape


class ByShape(grain.MapDataset[Drawn]):
    """An order in which each batch has examples of one shape: an epoch holds the same images, in other batches.

    The images of each shape keep their order, and a batch comes when the last of its images would have come. Images
    that are left over at the end of an epoch fill one batch more where they are enough for one: of the shape that most
    of them have, and again with the first of that shape.

    Args:
        order: places in the source, without end.
        source: has ``sizes``.
        reader: a :class:`~evmamba_jax.data.readers.ShapedReader`.
        seed: of the draws that shapes depend on.
        global_batch: examples of a batch.

    Source: mmdet's ``AspectRatioBatchSampler``, which pads the last batch of all shapes to the largest of them.
    """

    def __init__(self, order: grain.MapDataset, source: Any, reader: Any, *, seed: int, global_batch: int):
        super().__init__(order)
        self._order, self._sizes, self._reader, self._seed = order, source.sizes, reader, seed
        self._batch, self._epoch = global_batch, max(1, len(source) // global_batch) * global_batch
        self._known = _Epochs()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int):  # pyrefly: ignore[bad-override]
        epoch, place = divmod(index, self._epoch)
        with self._known.lock:
            if epoch not in self._known.places:
                while len(self._known.places) > 2:
                    del self._known.places[min(self._known.places)]
                self._known.places[epoch] = self._composed(epoch)
            position, shape = self._known.places[epoch][place]
        return Drawn(self._order[position], (self._seed, position), shape)

    def _composed(self, epoch: int) -> list[tuple[int, Shape]]:
        """Return positions of the order, as they come in the batches of an epoch, and their shapes."""
        first, batch = epoch * len(self._sizes), self._batch
        members: dict[Shape, list[int]] = {}
        batches: list[tuple[list[int], Shape]] = []
        taken: dict[Shape, int] = {}
        for position in range(first, first + len(self._sizes)):
            rng = np.random.default_rng((self._seed, position))
            height, width = self._sizes[self._order[position]].tolist()
            shape = self._reader.train_shape((height, width), rng)
            members.setdefault(shape, []).append(position)
            if len(members[shape]) - taken.get(shape, 0) == batch:
                batches.append((members[shape][-batch:], shape))
                taken[shape] = len(members[shape])
        while len(batches) * batch < self._epoch:
            left = {shape: those[taken.get(shape, 0) :] for shape, those in members.items()}
            shape = max(left, key=lambda shape: len(left[shape]))
            batches.append(((left[shape] + members[shape] * batch)[:batch], shape))
            taken[shape] = len(members[shape])
        return [(position, shape) for positions, shape in batches[: self._epoch // batch] for position in positions]


class _Epochs:
    """What threads know of the epochs that are read; worker processes find it out anew."""

    def __init__(self):
        self.lock, self.places = threading.Lock(), {}

    def __reduce__(self):
        return _Epochs, ()


def eval_order(source: Any, reader: Any, global_batch: int) -> list[tuple[int, Shape]]:
    """Return index and shape of every image, those of one shape together; index -1 fills the last batch of a shape."""
    members: dict[Shape, list[int]] = {}
    for index, (height, width) in enumerate(source.sizes.tolist()):
        members.setdefault(reader.eval_shape((height, width)), []).append(index)
    return [
        (index, shape)
        for shape, indices in sorted(members.items())
        for index in indices + [-1] * (-len(indices) % global_batch)
    ]


class _Parts(grain.MapDataset[Batch]):
    """The rows of one process, step after step. The rows of a step come in parts of nearly equal size."""

    def __init__(self, examples: grain.MapDataset[Example], rows: range, global_batch: int, start_step: int = 0):
        super().__init__(examples)
        self._examples, self._rows, self._global_batch, self._start_step = examples, rows, global_batch, start_step
        self.a_batch = math.ceil(len(rows) / _PART)

    def __len__(self) -> int:
        return (len(self._examples) // self._global_batch - self._start_step) * self.a_batch

    def __getitem__(self, index: int):  # pyrefly: ignore[bad-override]
        step, part = divmod(index, self.a_batch)
        start, stop = (i * len(self._rows) // self.a_batch for i in (part, part + 1))
        first = (self._start_step + step) * self._global_batch
        examples: list[Example] = [self._examples[first + row] for row in self._rows[start:stop]]  # pyrefly: ignore
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


class _Last(threading.local):
    """What a thread has decoded last: with repeated augmentation the next is often the same."""

    index: int = -1
    decoded: Any = None

    def __reduce__(self):
        return _Last, ()


@dataclasses.dataclass(frozen=True)
class _TrainExample(grain.transforms.RandomMap):
    """From an index to a training example."""

    config: DataConfig
    source: Any
    ledger: Ledger
    reader: Any
    last: _Last = dataclasses.field(default_factory=_Last)

    def random_map(self, element: int | Drawn, rng: np.random.Generator) -> Example:  # pyrefly: ignore[bad-override]
        first = element.index if isinstance(element, Drawn) else element
        passed_over = 0
        for index in itertools.chain(range(first, len(self.source)), range(first)):
            if isinstance(element, Drawn):  # any image in its place has its shape
                size, rng = self.source.sizes[index].tolist(), np.random.default_rng(element.seed)
                if self.reader.train_shape(size, rng) != element.shape:
                    continue
                rng = np.random.default_rng(element.seed)
            with self.ledger.in_hand(index):
                if self.last.index != index:
                    try:
                        self.last.decoded = _decoded(self.source, index, self.reader)
                    except CorruptImageError as error:
                        _stop_unless_skipping(self.config, self.source, error)
                        passed_over += 1
                        continue
                    self.last.index = index
                example = self.reader.train(self.last.decoded, rng)
            return example | {"corrupt": np.int32(passed_over)}
        raise UserError(f"not one image of {self.source.name}, split {self.source.split}, can be read")


@dataclasses.dataclass(frozen=True)
class _EvalExample(grain.transforms.Map):
    """From an index, padding included, to an evaluation example."""

    config: DataConfig
    source: Split
    ledger: Ledger
    reader: Reader

    def map(self, element: tuple[int, Shape | None]) -> Example:  # pyrefly: ignore[bad-override]
        index, shape = element
        of_shape: dict[str, Any] = {} if shape is None else {"shape": shape}
        if index < 0:
            return self.reader.blank(training=False, **of_shape) | _about(index=-1)
        with self.ledger.in_hand(index):
            try:
                decoded = _decoded(self.source, index, self.reader)
                return self.reader.evaluate(decoded) | _about(index=index, weight=1)
            except CorruptImageError as error:
                _stop_unless_skipping(self.config, self.source, error)
                return self.reader.blank(training=False, **of_shape) | _about(index=index, corrupt=1)


def _about(*, index: int, weight: float = 0, corrupt: int = 0) -> Example:
    return {"weight": np.float32(weight), "index": np.int32(index), "corrupt": np.int32(corrupt)}


def _decoded(source: Split, index: int, reader: Reader) -> Any:
    """Return what is in a record; a CorruptImageError names it."""
    record = source[index]
    try:
        return reader.decode(record)
    except CorruptImageError as error:
        raise CorruptImageError(f"{printable(record['id'])}: {error}") from error


def _stop_unless_skipping(config: DataConfig, source: Split, error: CorruptImageError) -> None:
    if config.on_corrupt == "error":
        raise UserError(
            f"corrupt image in {source.name}, split {source.split}: {error};"
            " mend the data set, or pass over such images with data.on_corrupt=skip"
        ) from error


def _rows(source: Split, global_batch: int, process_index: int, process_count: int) -> range:
    """Return the rows of one process in each global batch, after checking that it can be shared out."""
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index={process_index} is not allowed: it must be 0 to {process_count - 1}")
    if process_count > len(source):
        raise UserError(
            f"{process_count} processes are more than the {len(source)} examples of {source.name}, split {source.split}"
            ": use fewer processes"
        )
    if global_batch < 1 or global_batch % process_count:
        raise UserError(f"global batch {global_batch} cannot be shared by {process_count} processes: use a multiple")
    local_batch = global_batch // process_count
    return range(process_index * local_batch, (process_index + 1) * local_batch)


def _read_ahead(parts: _Parts, config: DataConfig, ledger: Ledger) -> Batches:
    """Decode in threads, or in worker processes with threads; one element is one part, so contents never change.

    Ahead of what is asked for are one batch and one part for each thread, and on the way from worker processes four
    parts from each; Grain's default would be 500 elements a process.
    """
    workers = max(1, config.num_workers)
    ahead = math.ceil(parts.a_batch / workers) + ledger.threads
    elements = parts.to_iter_dataset(grain.ReadOptions(num_threads=ledger.threads, prefetch_buffer_size=ahead))
    if config.num_workers:
        if not flags.FLAGS.is_parsed():  # Grain's own flags; outside absl.app nobody has parsed them
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=config.num_workers, per_worker_buffer_size=1)
        # Images go through shared memory, the few bytes of labels with the message that says where they are.
        shared = grain.experimental.DatasetOptions(min_shm_size=2**12)
        elements = grain.experimental.WithOptionsIterDataset(elements, shared)
        elements = elements.mp_prefetch(options, worker_init_fn=functools.partial(begin, ledger))
    return Batches(elements, parts.a_batch, ledger)
