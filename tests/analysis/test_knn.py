"""Neighbours, votes and probes, against slow loops and scikit-learn."""

import math

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from evmamba_jax.analysis import knn_accuracy, knn_classes, linear_probe, neighbours
from evmamba_jax.errors import UserError


def clusters(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features of three classes that overlap, and labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(3, 5))
    labels = rng.integers(0, 3, count)
    return (centres[labels] + 1.2 * rng.normal(size=(count, 5))).astype(np.float32), labels


def slow_votes(bank, bank_labels, queries, k, temperature):
    """DINO's votes in float64, query by query."""
    found = []
    for query in np.float64(queries):
        similar = [query @ one / math.sqrt((query @ query) * (one @ one)) for one in np.float64(bank)]
        nearest = sorted(range(len(bank)), key=lambda i: -similar[i])[:k]
        votes = dict.fromkeys(range(3), 0.0)
        for i in nearest:
            votes[bank_labels[i]] += math.exp(similar[i] / temperature)
        found.append((nearest, [similar[i] for i in nearest], max(votes, key=lambda label: votes[label])))
    return found


def test_neighbours_and_weighted_votes_are_those_of_a_slow_loop():
    (bank, bank_labels), (queries, labels) = clusters(90, 0), clusters(40, 1)
    slow = slow_votes(bank, bank_labels, queries, 7, 0.07)
    near = neighbours(bank, queries, 7)
    assert near.index.tolist() == [nearest for nearest, _, _ in slow]
    np.testing.assert_allclose(near.similarity, [similar for _, similar, _ in slow], atol=1e-6)
    voted = [vote for *_, vote in slow]
    assert knn_classes(near, bank_labels, 3).tolist() == voted
    accuracy = knn_accuracy(bank, bank_labels, queries, labels, k=7)
    assert accuracy == np.mean(np.array(voted) == labels)
    uniform = knn_classes(near, bank_labels, 3, temperature=math.inf)
    assert (uniform != voted).any()  # else the weights would go untested


def test_uniform_votes_are_those_of_scikit_learn():
    images, labels = load_digits(return_X_y=True)
    bank, queries = images[:600], images[600:900]
    theirs = KNeighborsClassifier(9, metric="cosine", algorithm="brute").fit(bank, labels[:600])
    near = neighbours(bank, queries, 9)
    found = knn_classes(near, labels[:600], 10, temperature=math.inf)
    assert found.tolist() == theirs.predict(queries).tolist()
    share = knn_accuracy(bank, labels[:600], queries, labels[600:900], k=9, temperature=math.inf)
    assert share == pytest.approx(theirs.score(queries, labels[600:900]))


def test_blocks_of_queries_change_nothing(monkeypatch):
    (bank, _), (queries, _) = clusters(30, 0), clusters(11, 1)
    whole = neighbours(bank, queries, 4)
    monkeypatch.setattr("evmamba_jax.analysis.knn._BLOCK", 100)  # three queries at a time
    parts = neighbours(bank, queries, 4)
    np.testing.assert_array_equal(parts.index, whole.index)


def test_a_probe_separates_what_a_plane_does_and_chooses_its_strength():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 400)
    features = rng.normal(size=(400, 30))
    features[:, 4] += 6 * labels  # a thousandth of the others after the next line: standardised away
    features[:, 4] *= 1e-3
    probe = linear_probe(features[:300], labels[:300], features[300:], labels[300:])
    assert probe.accuracy > 0.97
    assert probe.converged
    noise = rng.normal(size=(120, 40))
    guessed = linear_probe(noise[:100], rng.integers(0, 2, 100), noise, np.zeros(120, int))
    assert guessed.strength in (0.01, 0.1, 1.0, 10.0)
    assert 0.2 < guessed.accuracy < 0.8


def test_mistakes_are_told():
    bank, labels = clusters(5, 0)
    with pytest.raises(UserError, match="k is 6; it must be 1 to 5"):
        neighbours(bank, bank, 6)
    with pytest.raises(UserError, match="are needed"):
        neighbours(bank, bank[:, :3], 1)
    with pytest.raises(UserError, match="1 of 5 features are not finite"):
        neighbours(np.where(np.arange(25).reshape(5, 5) == 7, np.nan, bank), bank, 1)
    with pytest.raises(UserError, match="one class"):
        knn_accuracy(bank, np.zeros(5, int), bank, np.zeros(5, int))
    with pytest.raises(UserError, match="one class"):
        linear_probe(bank, np.zeros(5, int), bank, labels)
