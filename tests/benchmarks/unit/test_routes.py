"""What a record says of routing is what the adapters computed, over real tokens only."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity

import moepeft
from benchmarks.cells import routing as routes
from benchmarks.cells.data import TokenisedTask
from benchmarks.families.batch import HeadRow
from benchmarks.families.encoder import Encoder, MultiTaskModel
from benchmarks.protocols.protocol import Protocol
from benchmarks.tasks.base import TaskSpec
from tests.support import hosts

SPECS = [TaskSpec(name, "classification", labels=("no", "yes"), metric="accuracy") for name in ("a", "b", "c")]


def tasks(lengths: tuple[int, ...]) -> list[TokenisedTask]:
    random = np.random.default_rng(3)

    def row(index: int, length: int) -> HeadRow:
        ids = tuple(map(int, random.integers(1, hosts.VOCABULARY, length)))
        return HeadRow(sequences=(ids,), segments=None, label=0.0, index=index)

    return [TokenisedTask(spec, (), tuple(row(*pair) for pair in enumerate(lengths))) for spec in SPECS]


def attached(method: str, **fields) -> MultiTaskModel:
    torch.manual_seed(0)
    model = MultiTaskModel(hosts.bert(), SPECS, hidden=hosts.WIDTH, stream=("test",))
    if method != "head":
        model.attachment = moepeft.attach(model.backbone, moepeft.method(method, num_tasks=len(SPECS), **fields))
        for parameter in model.attachment.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def collect(model: MultiTaskModel, rows: list[TokenisedTask]):
    protocol = Protocol(name="t", tasks=("a", "b", "c"), steps=1)
    family = Encoder(protocol, SimpleNamespace(pad_token_id=0), tuple(SPECS))
    return routes.collect(model, rows, family, autocast=False)


def test_task_gates_are_those_of_the_adapters():
    model = attached("ept")
    routing = collect(model, tasks((5, 9, 7)))
    assert routing.tasks == ["a", "b", "c"]
    assert routing.rows == {"a": 3, "b": 3, "c": 3}
    assert len(routing.sites) == len(model.attachment.sites) == 12
    for site in routing.sites:
        adapter = model.attachment.adapters[site.site]
        gates = adapter.route(adapter.task_embedding).detach()
        assert np.array(site.weights) == pytest.approx(gates.numpy(), rel=1e-3)
        assert np.array(site.shares) == pytest.approx((gates > 0).numpy() / 2)
        assert np.array(site.entropy) == pytest.approx(torch.special.entr(gates).sum(-1).numpy(), rel=1e-3)


def test_ranks_are_experts_of_which_one_is_chosen():
    model = attached("more", rank=4)
    for site in collect(model, tasks((5,))).sites:
        ranks = model.attachment.adapters[site.site].ranks()
        assert [weights.index(1.0) + 1 for weights in site.weights] == ranks.tolist()
        assert site.weights == site.shares
        assert site.entropy == [0.0] * 3


@pytest.mark.parametrize("method", ["mixlora", "tucka", "moelora"])
def test_padding_counts_for_nothing(method, monkeypatch):
    model = attached(method)
    padded = collect(model, tasks((3, 9, 17, 4)))
    # One row per batch is padded by seven tokens at most; pooled by batch, a router sees other batches then.
    monkeypatch.setattr(routes, "BATCH_ROWS", 1)
    alone = collect(model, tasks((3, 9, 17, 4)))
    monkeypatch.setattr("benchmarks.families.batch.LENGTH_MULTIPLE", 1)
    bare = collect(model, tasks((3, 9, 17, 4)))
    assert [site.weights for site in alone.sites] == [pytest.approx(np.array(site.weights)) for site in bare.sites]
    if method != "tucka":
        for one, other in zip(padded.sites, bare.sites, strict=True):
            assert np.array(one.weights) == pytest.approx(np.array(other.weights), rel=1e-3)


def test_token_gates_are_the_routers_choices():
    model = attached("mixlora", num_experts=4, top_k=2)
    rows = tasks((6,))
    routing = collect(model, rows)
    assert [site.role for site in routing.sites] == ["up", "up"]
    seen = []
    up = model.backbone.get_submodule(routing.sites[0].site)
    hook = up.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids = torch.tensor([rows[1].validation[0].sequences[0]])
    with torch.no_grad():
        model.backbone(ids, attention_mask=torch.ones_like(ids), task_ids=torch.tensor([1]))
    hook.remove()
    (router,) = [value for name, value in model.attachment.named_parameters() if "layer/0" in name]
    top = (seen[0][0] @ router.T).softmax(-1).topk(2)
    gates = torch.zeros(6, 4).scatter(1, top.indices, top.values / top.values.sum(-1, keepdim=True))
    assert routing.sites[0].weights[1] == pytest.approx(gates.mean(0).tolist(), rel=1e-3)
    assert routing.sites[0].shares[1] == pytest.approx(((gates > 0).sum(0) / 12).tolist(), rel=1e-3)


def test_experts_of_all_groups_are_told_apart():
    routing = collect(attached("tucka", groups=3, experts=2), tasks((5, 9)))
    for site in routing.sites:
        for weights in site.weights:
            (group,) = {at // 2 for at in np.flatnonzero(weights)}
            assert 0 <= group < 3
            assert len(weights) == 6


@pytest.mark.parametrize("method", ["head", "lora"])
def test_without_experts_there_is_nothing_to_tell(method):
    assert collect(attached(method), tasks((5,))) is None


def test_nothing_stays_on_after_the_look():
    model = attached("ept")
    collect(model, tasks((5,)))
    assert model.attachment.runtime.settings.stats is None


def test_embeddings_agree_with_scikit_learn():
    model = attached("ept")
    found = collect(model, tasks((5,))).embeddings
    tables = [adapter.task_embedding.detach().double().numpy() for adapter in model.attachment.adapters.values()]
    assert np.array(found.cosine) == pytest.approx(np.mean([cosine_similarity(t) for t in tables], axis=0), rel=1e-3)
    names = list(model.attachment.adapters)
    assert [one.site for one in found.maps] == [names[0], names[5], names[11]]
    pca = PCA(2).fit(tables[5])
    assert found.maps[1].explained == pytest.approx(pca.explained_variance_ratio_, rel=1e-3)
    points = np.array(found.maps[1].points)
    assert np.abs(points) == pytest.approx(np.abs(pca.transform(tables[5])), rel=1e-3)
    assert (points[np.abs(points).argmax(0), [0, 1]] > 0).all()


def test_shared_embeddings_are_one_table_and_fewer_tasks_than_components_are_no_error():
    assert [one.site for one in collect(attached("moelora"), tasks((5,))).embeddings.maps] == ["shared"]
    lonely = routes.embedding_map("site", torch.randn(1, 4).double())
    assert lonely.points == [[0.0, 0.0]]
    assert lonely.explained == [0.0, 0.0]
