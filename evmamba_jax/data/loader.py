"""Batches for training and evaluation, from a source through Grain.

The step number is the whole state of the input: batch ``step`` is a pure function of (seed, global batch, step),
whatever the number of hosts, threads and worker processes, so resuming needs nothing but that number.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Mapping

import grain
import numpy as np
from absl import flags

from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.sources import Source
from evmamba_jax.data.transforms import CorruptImageError, eval_image, train_image
from evmamba_jax.errors import UserError

Example = dict[str, np.ndarray | np.generic]
Batch = Mapping[str, np.ndarray]


class Batches(Iterator[Batch]):
    """An iterator over batches that stops its threads and worker processes when closed; also a context manager."""

    def __init__(self, batches: grain.IterDataset):
        self._iterator = iter(batches)

    def __next__(self) -> Batch:
        return next(self._iterator)

    def close(self) -> None:
        """Stop reading ahead; further calls of ``next`` fail."""
        self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def train_batches(
    config: DataConfig,
    source: Source,
    *,
    seed: int,
    global_batch: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
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

    Returns:
        Iterator of ``image`` uint8 (b, H, W, C), ``label`` int32 (b,) and ``corrupt`` int32 (b,), the number of
        unreadable records that were passed over for this example.

    Raises:
        UserError: a batch that cannot be divided, more processes than examples, a bad seed; and from the iterator: an
            unreadable record, named, where ``on_corrupt`` is "error".
    """
    local_batch = _local_batch(source, global_batch, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is not allowed: it must be 0 to {2**32 - 1}")
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    if config.repeated_aug > 1:
        order = _Views(order, len(source), config.repeated_aug)
    examples = order.random_map(_TrainExample(config, source))
    blocks = examples.batch(local_batch)  # block s * process_count + p is what process p needs at step s
    return _read_ahead(blocks[start_step * process_count + process_index :: process_count], config)


def eval_batches(
    config: DataConfig, source: Source, *, global_batch: int, process_index: int = 0, process_count: int = 1
) -> Batches:
    """Read every example exactly once, in order; all processes get the same number of batches.

    Args:
        config: reads the host-side fields.
        source: the evaluation split.
        global_batch: examples a step over all processes.
        process_index: this process, as in ``jax.process_index()``.
        process_count: number of processes.

    Returns:
        Iterator over ceil(len(source) / global_batch) batches of ``image`` uint8 (b, H, W, C), ``label`` int32 (b,),
        ``weight`` float32 (b,), ``index`` int32 (b,) and ``corrupt`` int32 (b,). ``weight`` is 1 where the example
        counts; it is 0 for the padding of the last batch (``index`` -1) and for unreadable records (``corrupt`` 1).

    Raises:
        UserError: as ``train_batches``.
    """
    local_batch = _local_batch(source, global_batch, process_index, process_count)
    padded = math.ceil(len(source) / global_batch) * global_batch
    blocks = grain.MapDataset.range(padded).map(_EvalExample(config, source)).batch(local_batch)
    return _read_ahead(blocks[process_index::process_count], config)


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


@dataclasses.dataclass(frozen=True)
class _TrainExample(grain.transforms.RandomMap):
    """From an index to a training example."""

    config: DataConfig
    source: Source

    def random_map(self, element: int, rng: np.random.Generator) -> Example:  # pyrefly: ignore[bad-override]
        for passed_over in range(len(self.source)):
            record = self.source[(element + passed_over) % len(self.source)]
            try:
                image = train_image(record["image"], self.config, rng)
            except CorruptImageError as error:
                _stop_unless_skipping(self.config, self.source, record["id"], error)
                continue
            return {"image": image, "label": np.int32(record["label"]), "corrupt": np.int32(passed_over)}
        raise UserError(f"not one image of {self.source.name}, split {self.source.split}, can be read")


@dataclasses.dataclass(frozen=True)
class _EvalExample(grain.transforms.Map):
    """From an index, padding included, to an evaluation example."""

    config: DataConfig
    source: Source

    def map(self, element: int) -> Example:  # pyrefly: ignore[bad-override]
        size, channels = self.config.image_size, self.config.in_channels
        example: Example = {
            "image": np.zeros((size, size, channels), np.uint8),
            "label": np.int32(0),
            "weight": np.float32(0),
            "index": np.int32(-1),
            "corrupt": np.int32(0),
        }
        if element >= len(self.source):
            return example
        record = self.source[element]
        example |= {"label": np.int32(record["label"]), "index": np.int32(element)}
        try:
            return example | {"image": eval_image(record["image"], self.config), "weight": np.float32(1)}
        except CorruptImageError as error:
            _stop_unless_skipping(self.config, self.source, record["id"], error)
            return example | {"corrupt": np.int32(1)}


def _stop_unless_skipping(config: DataConfig, source: Source, record_id: str, error: CorruptImageError) -> None:
    if config.on_corrupt == "error":
        raise UserError(
            f"corrupt image {record_id} in {source.name}, split {source.split}: {error};"
            " mend the data set, or pass over such images with data.on_corrupt=skip"
        ) from error


def _local_batch(source: Source, global_batch: int, process_index: int, process_count: int) -> int:
    """Return the rows of one process, after checking that the batch can be shared out."""
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index={process_index} is not allowed: it must be 0 to {process_count - 1}")
    if process_count > len(source):
        raise UserError(
            f"{process_count} processes are more than the {len(source)} examples of {source.name}, split {source.split}"
            ": use fewer processes"
        )
    if global_batch < 1 or global_batch % process_count:
        raise UserError(f"global batch {global_batch} cannot be shared by {process_count} processes: use a multiple")
    return global_batch // process_count


def _read_ahead(blocks: grain.MapDataset, config: DataConfig) -> Batches:
    """Decode in threads, or in worker processes with threads; one element is one batch, so contents never change."""
    threads = config.num_threads or min(16, math.ceil((os.cpu_count() or 1) / max(1, config.num_workers)))
    # Grain's default would hold 500 elements, which here are batches.
    batches = blocks.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1))
    if config.num_workers:
        if not flags.FLAGS.is_parsed():  # Grain's own flags; outside absl.app nobody has parsed them
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=config.num_workers, per_worker_buffer_size=1)
        batches = batches.mp_prefetch(options, worker_init_fn=_keep_off_accelerators)
    return Batches(batches)


def _keep_off_accelerators(worker_index: int, worker_count: int) -> None:
    """Worker processes import the main module, and with it JAX: they must not take the main process's devices."""
    del worker_index, worker_count
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # already imported, and then the variable has been read
        sys.modules["jax"].config.update("jax_platforms", "cpu")
