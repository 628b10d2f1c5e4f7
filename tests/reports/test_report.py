"""report.html: its figures against scikit-learn and loops, its text for any name, nothing from outside."""

import html.parser

import numpy as np
import pytest
from sklearn import metrics

from evmamba_jax.reports import classified, page
from evmamba_jax.reports.page import Section

NAMES = ("cat", "<b>dog</b>", "写\n\x1b[31m", "never seen")


@pytest.fixture(scope="module")
def answers():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    logits = rng.normal(size=(200, 4)) + 2 * np.eye(4)[labels]
    scores = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
    image = rng.integers(0, 256, (8, 8, 3), np.uint8)
    kinds = scores.argmax(1) == labels
    wrong, right = (np.flatnonzero(kinds == kind)[:3] for kind in (False, True))
    return classified.Answers(labels, scores, [(int(i), image) for i in wrong], [(int(i), image) for i in right])


def test_figures_are_scikit_learns(answers):
    found = answers.scores.argmax(1)
    matrix = classified.counts(answers)
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(answers.labels, found, labels=range(4)))
    over = {"labels": [0, 1, 2], "average": "macro"}  # the last class has no images
    assert classified.figures(matrix) == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(answers.labels, found),
            "balanced accuracy": metrics.recall_score(answers.labels, found, **over),
            "macro F1": metrics.f1_score(answers.labels, found, **over),
        }
    )


def test_intervals_are_those_of_a_bootstrap_image_by_image(answers):
    found, rng = answers.scores.argmax(1), np.random.default_rng(1)
    drawn = []
    for _ in range(1000):
        rows = rng.integers(0, 200, 200)
        drawn.append(metrics.f1_score(answers.labels[rows], found[rows], labels=[0, 1, 2], average="macro"))
    wanted = np.percentile(drawn, (2.5, 97.5))
    np.testing.assert_allclose(classified.intervals(classified.counts(answers))["macro F1"], wanted, atol=0.012)


def test_calibration_is_that_of_a_loop(answers):
    images, sure, share, error = classified.calibration(answers)
    surest, right = answers.scores.max(1), answers.scores.argmax(1) == answers.labels
    distance = 0.0
    for k in range(10):
        rows = [i for i in range(200) if min(9, int(surest[i] * 10)) == k]
        assert images[k] == len(rows)
        if rows:
            assert sure[k] == pytest.approx(surest[rows].mean())
            assert share[k] == pytest.approx(right[rows].mean())
            distance += len(rows) / 200 * abs(surest[rows].mean() - right[rows].mean())
    assert error == pytest.approx(distance)


class Page(html.parser.HTMLParser):
    """Notes what a page has, and that every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            assert dict(attributes)["alt"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_page_holds_all_it_shows_whatever_the_names(answers, tmp_path):
    sections = classified.sections(answers, NAMES, "a model")
    page.write_page(
        tmp_path / "report.html", "photos & <more>", [*sections, Section("End", page.lines(["<i>one</i>"]))]
    )
    text = (tmp_path / "report.html").read_text("utf-8")
    shown = Page(text)
    assert not shown.open
    assert all(source.startswith("data:image/png;base64,") for source in shown.sources)
    assert len(shown.sources) == 2 + 6
    assert "b" not in shown.tags
    assert "i" not in shown.tags
    for written in ("photos & <more>", "<b>dog</b>", "写\\n\\x1b[31m", "<i>one</i>"):
        assert written in shown.text
    area = metrics.roc_auc_score(answers.labels == 0, answers.scores[:, 0])
    assert f"{area:.3f}" in shown.text
    assert "✗" in shown.text  # right and wrong are told apart without colour
    assert "✓" in shown.text


def test_nothing_wrong_is_said_so(answers):
    labels = answers.scores.argmax(1)
    perfect = answers._replace(labels=labels, wrong=[])
    (mistakes,) = [s for s in classified.sections(perfect, NAMES, "a model") if s.heading == "Surest mistakes"]
    assert "None." in mistakes.body
