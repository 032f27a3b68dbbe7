"""Figures: drawn from the records alone, each where the records allow it."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from adjustText import get_bboxes

from benchmarks.records.schema import EmbeddingMap, SiteRouting, TaskEmbeddings
from benchmarks.reporting.figures.curves import smooth, subtract_baseline
from benchmarks.reporting.figures.embeddings import draw_embeddings
from benchmarks.reporting.figures.experts import draw_routing, find_blocks, find_unused, measure_entropies
from benchmarks.reporting.figures.plan import plan_figures
from benchmarks.reporting.figures.style import use_style, write_svg
from benchmarks.reporting.figures.trade_off import find_pareto_front
from tests.support.record_factory import TASKS, make_record, make_routing
from tests.support.tables import frame_of, only_group

SVG = "{http://www.w3.org/2000/svg}svg"


def plan(*records):
    return plan_figures(frame_of(*records), only_group(*records))


def draw(drawing) -> bytes:
    with use_style():
        return write_svg(drawing(), "a test")


def make_records(*methods: str, seeds: int = 1, **changes):
    return [make_record(method, seed, **changes)[0] for method in methods for seed in range(seeds)]


@pytest.mark.slow
def test_every_figure_is_an_svg_without_a_date():
    routed = make_record("a@b")[0].model_copy(update={"routing": make_routing(list(TASKS), layers=2, roles="q up")})
    drawings = plan(routed, *make_records("majority", "head", "alpha", "bravo", seeds=2))
    assert set(drawings) == {
        "score-parameters", "score-step-time", "training-curves", "critical-difference", "routing-a_b",
        "task-embeddings-a_b",
    }  # fmt: skip
    for name, drawing in drawings.items():
        svg = draw(drawing)
        assert ET.fromstring(svg).tag == SVG, name
        assert b"dc:date" not in svg
        assert draw(drawing) == svg


def test_failures_alone_give_no_figure():
    assert plan(make_record(status="oom", reason="no")[0]) == {}


def test_figures_do_not_depend_on_the_users_style():
    drawing = plan(*make_records("alpha", "bravo"))["score-parameters"]
    plain = draw(drawing)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "none"}):
        assert draw(drawing) == plain
        assert mpl.rcParams["font.size"] == 30


def test_ranks_are_drawn_from_five_tasks_and_three_methods_on():
    name, methods = "critical-difference", ("alpha", "bravo", "charlie")
    assert name in plan(*make_records(*methods))
    assert name not in plan(*make_records(*methods[:2]))
    assert name not in plan(*make_records(*methods[:2], "head"))
    assert name not in plan(*make_records(*methods, protocol={"tasks": list(TASKS)[:4]}))


def test_routing_is_that_of_the_first_seed_that_has_it():
    def route(seed, routing):
        return make_record("a@b", seed)[0].model_copy(update={"routing": routing})

    routing = make_routing(list(TASKS), layers=2, roles="q up")
    drawings = plan(make_record()[0], route(0, None), route(1, routing))
    figure = drawings["routing-a_b"]()
    assert "seed 1" in figure.get_suptitle()
    without = plan(route(0, routing.model_copy(update={"embeddings": None})))
    assert {name for name in without if "a_b" in name} == {"routing-a_b"}


def test_curves_have_a_panel_for_the_difference_to_a_baseline():
    def count_panels(*methods: str) -> int:
        return len(plan(*make_records(*methods))["training-curves"]().axes)

    assert count_panels("head", "alpha", "bravo") == 2
    assert count_panels("alpha", "bravo") == count_panels("head") == 1


def test_curves_less_those_of_the_baseline_on_the_same_rows():
    rows = [("head", 0, 1, 0.7), ("head", 0, 10, 0.5), ("head", 1, 1, 0.6), ("head", 1, 10, 0.9),
            ("alpha", 1, 1, 0.5), ("alpha", 1, 10, 0.4), ("alpha", 1, 20, 0.1), ("alpha", 2, 1, 0.1)]  # fmt: skip
    gaps = subtract_baseline(pd.DataFrame(rows, columns=["label", "seed", "step", "value"]), "head")
    # Another seed's rows are others, and so are another step's.
    assert gaps[["label", "seed", "step"]].values.tolist() == [["alpha", 1, 1], ["alpha", 1, 10]]
    assert gaps["value"].tolist() == pytest.approx([-0.1, -0.5])


def make_site(name, layer, shares):
    return SiteRouting(site=name, role="up", layer=layer, weights=shares, shares=shares, entropy=[0.0, 0.0])


def test_sites_that_route_alike_share_a_panel():
    one = make_site("block.0.up", 0, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    other = make_site("block.1.up", 1, [[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    assert list(find_blocks([one, other])) == ["layer 0", "layer 1"]
    assert len(find_blocks([one, one.model_copy(update={"site": "block.1.up"})])) == 1


def test_dead_experts_and_entropies_by_hand():
    site = make_site("block.0.up", 0, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert find_unused(site) == [2]
    # Two of three experts in turn: log 2 / log 3; a single choice has no entropy.
    assert measure_entropies(site) == pytest.approx((math.log(2) / math.log(3), 0.0))


def test_heat_maps_show_every_weight_once():
    routing = make_routing(list(TASKS), layers=2, roles="q up")
    with use_style():
        figure = draw_routing("title", routing)
    meshes = [mesh for axes in figure.axes for mesh in axes.collections if mesh.get_array() is not None]
    shown = np.concatenate([np.ma.filled(mesh.get_array(), 0).ravel() for mesh in meshes])
    weights = np.concatenate([np.ravel(site.weights) for site in routing.sites])
    unused = [np.tile(np.max(site.shares, axis=0) == 0, (len(TASKS), 1)).ravel() for site in routing.sites]
    assert len(shown) == len(weights)
    assert (shown < 0).sum() == np.concatenate(unused).sum()
    assert np.sort(shown[shown > 0]) == pytest.approx(np.sort(weights[weights > 0]), abs=2e-4)


def test_labels_of_tasks_do_not_cover_each_other():
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (12, 2))
    names = [f"task_{number}" for number in range(12)]
    maps = [EmbeddingMap(site="a", points=points.tolist(), explained=[0.4, 0.2])]
    with use_style():
        figure = draw_embeddings("title", names, TaskEmbeddings(cosine=np.eye(12).tolist(), maps=maps))
        texts = [text for text in figure.axes[0].texts if text.get_text() in names]
        boxes = get_bboxes(texts, ax=figure.axes[0])
    assert sorted(text.get_text() for text in texts) == sorted(names)
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert sum(a.overlaps(b) for a, b in pairs) == 0


def test_pareto_front():
    #          dear and best, beaten by 2, cheap, as cheap but worse, as good as 2 but dearer
    assert find_pareto_front([9, 5, 3, 3, 4], [0.9, 0.6, 0.7, 0.5, 0.7]) == [2, 0]


def test_curves_of_many_steps_are_running_means() -> None:
    noisy = pd.DataFrame({0: np.arange(80) % 2, 1: np.zeros(80)}, index=range(0, 800, 10))
    expected = np.convolve(noisy[0], np.ones(5) / 5, mode="valid")
    np.testing.assert_allclose(smooth(noisy)[0].to_numpy()[4:], expected)
    assert smooth(noisy).shape == noisy.shape
    pd.testing.assert_frame_equal(smooth(noisy[:20]), noisy[:20].astype(float))
