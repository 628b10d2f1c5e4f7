"""How well classes lie apart in features: nearest neighbours and a linear probe, both beside a bank of known images."""

import warnings
from typing import Any, NamedTuple

import numpy as np

from evmamba_jax.errors import UserError

K, TEMPERATURE = 20, 0.07  # DINO's
STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # values of C among which the probe chooses
_BLOCK = 2**24  # similarities in memory at a time


class Neighbours(NamedTuple):
    """The nearest of a bank for each query, the nearest first.

    Attributes:
        index: int64 (Q, k), places in the bank; of equally near ones the lower place comes first.
        similarity: float32 (Q, k), cosine of the angle between both features.
    """

    index: np.ndarray
    similarity: np.ndarray


def neighbours(bank: np.ndarray, queries: np.ndarray, k: int = K) -> Neighbours:
    """Return the ``k`` nearest features of a bank by cosine similarity, for each query.

    Args:
        bank: (N, D) floats.
        queries: (Q, D) floats.
        k: how many; N at most.

    Raises:
        UserError: ``k`` below 1 or above N; features of another length, or that are not finite.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise UserError(f"bank and queries are {bank.shape} and {queries.shape}; (N, D) and (Q, D) are needed")
    if not 1 <= k <= len(bank):
        raise UserError(f"k is {k}; it must be 1 to {len(bank)}, the number of features in the bank")
    known, asked = _unit(bank), _unit(queries)
    index = np.empty((len(queries), k), np.int64)
    similarity = np.empty((len(queries), k), np.float32)
    rows = max(1, _BLOCK // len(bank))
    for start in range(0, len(queries), rows):
        block = asked[start : start + rows] @ known.T
        near = np.argsort(-block, axis=1, kind="stable")[:, :k]
        index[start : start + rows] = near
        similarity[start : start + rows] = np.take_along_axis(block, near, 1)
    return Neighbours(index, similarity)


def _unit(features: np.ndarray) -> np.ndarray:
    """Return features (N, D) of length 1, float32; a feature of zeros stays as it is."""
    features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise UserError(f"{(~np.isfinite(features).all(1)).sum()} of {len(features)} features are not finite")
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def knn_classes(
    near: Neighbours, bank_labels: np.ndarray, classes: int, *, temperature: float = TEMPERATURE
) -> np.ndarray:
    """Return the class that the neighbours of each query vote for, int64 (Q,).

    Each neighbour votes for its class with the weight exp(similarity / temperature). Of equal votes the lower class
    wins.

    Args:
        near: of the queries.
        bank_labels: int (N,), the classes of the bank, from 0 to ``classes`` - 1.
        classes: their number.
        temperature: above 0; ``math.inf`` gives all votes the same weight.

    Source: Caron et al., DINO (arXiv:2104.14294), appendix on k-NN, after Wu et al. (arXiv:1805.01978);
    facebookresearch/dino ``eval_knn.py``.
    """
    # Less the largest similarity, which changes no vote's share.
    weights = np.exp((near.similarity - near.similarity[:, :1]).astype(np.float64) / temperature)
    votes = np.zeros((len(weights), classes))
    np.add.at(votes, (np.arange(len(weights))[:, None], bank_labels[near.index]), weights)
    return votes.argmax(1)


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    *,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> float:
    """Return the share of queries whose nearest neighbours vote for their class, 0 to 1.

    Args:
        bank: (N, D) floats.
        bank_labels: int (N,) from 0.
        queries: (Q, D) floats.
        query_labels: int (Q,) from 0.
        k: neighbours; all where the bank has fewer.
        temperature: as for :func:`knn_classes`.

    Raises:
        UserError: as for :func:`neighbours`; all features of one class.
    """
    classes = _several(bank_labels, query_labels)
    near = neighbours(bank, queries, min(k, len(bank)))
    return float((knn_classes(near, bank_labels, classes, temperature=temperature) == query_labels).mean())


def _several(*labels: np.ndarray) -> int:
    """Return the number of classes up to the highest label; refuse a single class."""
    known = np.unique(np.concatenate(labels))
    if len(known) < 2:
        raise UserError("all images are of one class: accuracies need two classes or more")
    return int(known[-1]) + 1


class Probe(NamedTuple):
    """What a linear probe reached.

    Attributes:
        accuracy: share of the queries that are right, 0 to 1.
        strength: C of the logistic regression, the inverse of its penalty.
        converged: whether its iterations came to an end.
    """

    accuracy: float
    strength: float
    converged: bool


def linear_probe(
    bank: np.ndarray, bank_labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray, *, seed: int = 0
) -> Probe:
    """Return what a logistic regression on the standardised features of a bank reaches on queries.

    Its C is the best of :data:`STRENGTHS` on a fifth of the bank, which is drawn; then it is fitted to the whole bank.

    Args:
        bank: (N, D) floats.
        bank_labels: int (N,).
        queries: (Q, D) floats.
        query_labels: int (Q,).
        seed: of the draw.

    Raises:
        UserError: all features of the bank are of one class.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    _several(bank_labels)
    scaler: Any = StandardScaler().fit(bank)  # pyrefly: ignore[bad-argument-type]
    known, asked = scaler.transform(bank), scaler.transform(queries)
    held = np.random.default_rng(seed).permutation(len(known)) < len(known) // 5
    converged = True

    def right(fitted: Any, judged: Any, labels: tuple[Any, Any], strength: float) -> float:
        nonlocal converged
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", ConvergenceWarning)
            model = LogisticRegression(C=strength, max_iter=1000).fit(fitted, labels[0])
        converged = not any(issubclass(one.category, ConvergenceWarning) for one in said)
        return float((model.predict(judged) == labels[1]).mean())

    strength = 1.0
    if held.any() and len(np.unique(bank_labels[~held])) > 1:
        parts = bank_labels[~held], bank_labels[held]
        strength = max(STRENGTHS, key=lambda strength: right(known[~held], known[held], parts, strength))
    accuracy = right(known, asked, (bank_labels, query_labels), strength)
    return Probe(accuracy, strength, converged)
