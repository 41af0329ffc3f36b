"""What the package defines, and that starmerge finds it by its entry points."""

import numpy as np
import torch
from starmerge_example.methods import Median

import starmerge_models as sm
from starmerge_models.evaluation.scoring.matching import read
from starmerge_models.evaluation.scoring.metrics import METRICS, Prediction, score
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.methods import METHODS, make_method


def test_the_median_is_numpy_s():
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(5, 7, generator=generator) for _ in range(3)]
    states = [{"w": sm.Dense(delta)} for delta in deltas] + [{}]  # one model leaves it alone
    merged = sm.merge_state(states, Median(alpha=2))["w"].to_dense()
    expected = 2 * np.median([*(d.double().numpy() for d in deltas), np.zeros((5, 7))], axis=0)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-6)


def test_starmerge_finds_the_method_and_knows_its_package():
    method = make_method("median", {"alpha": 0.5})
    assert method == Median(alpha=0.5)
    assert METHODS.origin(Median).record() == {"package": "starmerge-example", "version": "0.1.0"}


def _predictions(*pairs):
    return [
        Prediction(str(n), response, response, gold, float(response == gold))
        for n, (response, gold) in enumerate(pairs)
    ]


def test_metrics_of_rows_and_of_sums():
    predictions = _predictions((" olleh", "olleh"), ("olle", "olleh"), ("x", "olleh"))
    similar = score(predictions, METRICS.find("edit_similarity"))
    assert [p.credit for p in similar.predictions] == [1, 8 / 9, 0]
    np.testing.assert_allclose(similar.value, (1 + 8 / 9) / 3)
    shared = score(predictions, "char_f1")
    np.testing.assert_allclose(shared.value, 2 * 9 / (10 + 15))
    assert shared.low < shared.value < shared.high


def test_the_matcher_reads_the_last_word():
    task = find_task("backwards")
    assert read(task, "hello, so olleh.", "olleh").value == "olleh"
    assert read(task, "...", "olleh").value is None


def test_the_task_is_scored_by_the_metric():
    task = find_task("backwards")
    rows = task.examples("test", 3)
    assert [row.label for row in rows] == [row.fields["input"][::-1] for row in rows]
    assert task.scored_by is METRICS.find("edit_similarity")
