"""kNN against scikit-learn's neighbours and a vote written out."""

import types

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from train.config import Config, DataConfig, EvalConfig
from train.distributed import World
from train.evaluation import embed, knn
from train.network.resnet import ResNet
from train.run.data import EvalSet, RunData, split_bank

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)


def problem(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(5, 16, generator=generator)
    labels = torch.randint(5, (400,), generator=generator)
    x = centers[labels] + 1.5 * torch.randn(400, 16, generator=generator)
    x = F.normalize(x, dim=1)
    return x[:300], labels[:300], x[300:], labels[300:]


@pytest.mark.parametrize("k", [1, 20, 200])
def test_accuracy_equals_sklearn_with_the_same_weights(k):
    bank, bank_labels, queries, query_labels = problem()
    reference = KNeighborsClassifier(
        k, metric="euclidean", weights=lambda d: np.exp((1 - d**2 / 2) / 0.1)
    )  # |a - b|^2 = 2 - 2 cos
    reference.fit(bank.numpy(), bank_labels.numpy())
    expected = 100 * reference.score(queries.numpy(), query_labels.numpy())
    found = knn.knn_top1(
        queries, query_labels, bank, bank_labels, k=k, temperature=0.1, num_classes=5, world=ALONE
    )
    assert found == pytest.approx(expected, abs=1e-4)
    assert 50 < found < 100


def test_chunking_does_not_change_neighbours(monkeypatch):
    bank, _, queries, _ = problem()
    whole = knn.nearest(queries, bank, 7)
    monkeypatch.setattr(knn, "SIMILARITIES", 9 * len(bank))
    for a, b in zip(whole, knn.nearest(queries, bank, 7), strict=True):
        torch.testing.assert_close(a, b)


def test_bank_smaller_than_k_votes_with_what_there_is():
    bank, bank_labels, queries, query_labels = problem()
    args = (queries, query_labels, bank[:50], bank_labels[:50])
    options = {"temperature": 0.1, "num_classes": 5, "world": ALONE}
    assert knn.knn_top1(*args, k=200, **options) == knn.knn_top1(*args, k=50, **options)


def test_split_of_one_folder_is_disjoint_complete_and_repeatable():
    labels = np.arange(1000) % 7
    bank, queries = split_bank(labels, seed=3)
    assert len(queries) == 100
    assert sorted([*bank, *queries]) == list(range(1000))
    np.testing.assert_array_equal(queries, split_bank(labels, seed=3)[1])


@pytest.mark.parametrize("k", [10, 60])
def test_ranked_classes_are_sklearns_by_probability(k):
    bank, bank_labels, queries, _ = problem()
    reference = KNeighborsClassifier(
        k, metric="euclidean", weights=lambda d: np.exp((1 - d**2 / 2) / 0.1)
    )
    reference.fit(bank.numpy(), bank_labels.numpy())
    expected = reference.predict_proba(queries.numpy())
    similarity, rows = knn.nearest(queries, bank, k)
    found = knn.ranked(similarity, bank_labels[rows], num_classes=5, temperature=0.1, top=5)
    for guesses, probabilities in zip(found.tolist(), expected, strict=True):
        named = [guess for guess in guesses if guess >= 0]
        assert named == np.argsort(-probabilities)[: len(named)].tolist()
        assert len(named) == (probabilities > 0).sum() and set(guesses[len(named) :]) <= {-1}


def test_ranking_in_chunks_changes_nothing_and_agrees_with_the_vote(monkeypatch):
    bank, bank_labels, queries, _ = problem()
    similarity, rows = knn.nearest(queries, bank, 20)
    options = {"num_classes": 5, "temperature": 0.1}
    whole = knn.ranked(similarity, bank_labels[rows], top=3, **options)
    assert torch.equal(whole[:, 0], knn.vote(similarity, bank_labels[rows], **options))
    monkeypatch.setattr(knn, "SIMILARITIES", 7 * 5)
    assert torch.equal(knn.ranked(similarity, bank_labels[rows], top=3, **options), whole)


@pytest.mark.parametrize("fault", ["none", "no bank", "no queries", "nan", "huge k"])
def test_without_features_there_is_no_figure_and_it_is_said_why(fault, monkeypatch):
    rows, labels, more_rows, more_labels = problem()
    sets = {"bank": (rows, labels), "queries": (more_rows, more_labels)}
    if fault.startswith("no "):
        sets[fault[3:]] = (rows[:0], labels[:0])
    if fault == "nan":
        sets["bank"] = (torch.full_like(rows, torch.nan), labels)
    source = types.SimpleNamespace(root="DIR")
    reader = types.SimpleNamespace(source=source)
    bank, queries = (EvalSet(reader, np.arange(3), np.zeros(3)) for _ in range(2))
    data = RunData(reader, bank, queries, list("abcde"), "")
    config = Config(data=DataConfig(root="x"), eval=EvalConfig(k=1 << 39 if "k" in fault else 20))

    def embedded(backbone, images, *args, **options):
        features, classes = sets["bank" if images is bank else "queries"]
        return features, classes, classes

    monkeypatch.setattr(embed, "embed", embedded)
    told = []
    found = embed.knn_accuracy(None, data, config, ALONE, tell=told.append)
    expected = {"no bank": "DIR can be read", "no queries": "DIR can be read", "nan": "diverges"}
    if fault in expected:
        assert found is None and expected[fault] in told[0]
    else:
        assert found is not None and found > 50 and not told


def test_a_rank_without_images_has_features_of_no_rows():
    world = World(1, 2, 1, 2, torch.device("cpu"), None)
    images = EvalSet(types.SimpleNamespace(), np.arange(1), np.zeros(1, np.int64))
    backbone = ResNet("resnet18", stem="cifar", width=8)
    config = Config(data=DataConfig(root="x"))
    features, labels, ids = embed.embed(backbone, images, config, world)
    assert features.shape == (0, backbone.num_features) and len(labels) == len(ids) == 0
