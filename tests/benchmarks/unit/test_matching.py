"""The matched track: sizes found by the closed form, checked against modules and against all other sizes."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest

import moepeft
from benchmarks.backbones.load import backbone_sites, find_backbone
from benchmarks.backbones.shapes import build_shape
from benchmarks.methods.base import Refused
from benchmarks.methods.matching import TOLERANCE, count, nearest, sizes_of
from benchmarks.methods.parse import parse_methods
from benchmarks.methods.registered import Moepeft
from benchmarks.plan.cells import expand
from benchmarks.plan.options import Options, resolve_suite
from benchmarks.plan.track import apply_track
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Suite
from benchmarks.records.comparable import group_records
from moepeft.config import MethodConfig
from moepeft.errors import ConfigError, Unsupported
from moepeft.sites import find_sites, select_sites
from tests.support.record_factory import make_record

NAMES = [f"{name}@{preset}" for name in moepeft.available() for preset in ("published", "released")]


def suite(**fields: Any) -> Suite:
    common = {"name": "test", "tasks": ("a", "b"), "steps": 4, "backbone": "tiny-bert", "reference": "lora"}
    return Suite.model_validate({**common, "track": "matched", **fields})


def sites_of(shape: str) -> tuple[Any, ...]:
    return select_sites(find_sites(build_shape(shape)), None)


@pytest.mark.parametrize("name", NAMES)
def test_the_size_found_is_the_nearest_and_what_the_modules_hold(name):
    model = build_shape("minilm")
    sites = select_sites(find_sites(model), None)
    target = count(moepeft.method("lora"), sites)
    factory = moepeft.method(name, num_tasks=4)
    try:
        match = nearest(factory, sites, target)
    except Unsupported:
        with pytest.raises(Unsupported):
            factory.select(sites)
        return
    assert match.agrees == (abs(match.count - target) <= TOLERANCE * target)
    assert match.agrees == (match.refusal is None)
    assert match.agrees or f"{match.count:,}" in match.refusal
    adapters = moepeft.attach(model, match.factory)
    assert adapters.parameter_count().total == match.count
    adapters.detach()
    # Nothing but sizes was turned, and with the other sizes as they are no rank is nearer.
    changed = {
        field.name
        for field in dataclasses.fields(factory)
        if getattr(factory, field.name) != getattr(match.factory, field.name)
    }
    assert changed <= set(sizes_of(factory))
    for rank in range(1, 40):
        try:
            other = dataclasses.replace(match.factory, rank=rank)
        except ConfigError:
            continue
        assert abs(count(other, sites) - target) >= abs(match.count - target)


def test_a_method_is_its_own_match():
    for name in ("lora", "ept", "more", "moelora"):
        factory = moepeft.method(name, num_tasks=3)
        sites = sites_of("deberta-v3-base")
        assert nearest(factory, sites, count(factory, sites)).factory == factory


@dataclasses.dataclass(frozen=True)
class Coarse(MethodConfig):
    """1,000 numbers per unit of rank and of breadth; rank a multiple of breadth."""

    name: ClassVar[str] = "coarse"
    rank: int = 8
    breadth: int = 4

    def __post_init__(self) -> None:
        if self.rank % self.breadth:
            raise ConfigError("rank is no multiple of breadth")

    def build(self, site: Any, shared: Any) -> Any:
        raise AssertionError("sizes are matched by counts: nothing is built")

    def count(self, sites: Any) -> int:
        return 1000 * self.rank


class CoarseWithBreadth(Coarse):
    sizes: ClassVar[tuple[str, ...]] = ("rank", "breadth")


def test_further_sizes_are_turned_only_where_the_rank_alone_is_not_near_enough():
    assert nearest(Coarse(), (), 12_300).factory == Coarse(rank=12)
    match = nearest(Coarse(), (), 10_000)
    assert not match.agrees
    assert (match.factory, match.count) == (Coarse(rank=8), 8000)  # 12,000 is as far: the smaller one
    assert match.refusal == "no rank gives within 5% of 10,000 trainable numbers: the nearest is 8,000 at rank 8"
    match = nearest(CoarseWithBreadth(), (), 12_300)
    assert match.factory == CoarseWithBreadth(rank=12)
    match = nearest(CoarseWithBreadth(), (), 10_000)
    assert match.agrees
    assert match.factory == CoarseWithBreadth(rank=10, breadth=5)  # breadth 3 is as near, and gives 9,000 at best
    assert match.refusal is None


def test_the_tolerance_is_of_the_target():
    assert nearest(Coarse(breadth=1), (), 20_000).count == 20_000
    low, high = round(20_000 / (1 + TOLERANCE)) - 1, 20_000 + 1000
    assert nearest(Coarse(rank=20, breadth=20), (), high).agrees
    assert not nearest(Coarse(rank=20, breadth=20), (), low).agrees


def test_all_methods_of_a_run_are_brought_to_the_size_of_the_reference():
    methods = parse_methods(
        (
            "ept",
            "lora",
            "full",
            "peft:dora",
        ),
        num_tasks=2,
    )
    source = find_backbone("tiny-bert")
    found, matched = apply_track(suite(), methods, source)
    sites = backbone_sites(source, "encoder")
    assert found.target_parameters == count(moepeft.method("lora"), sites)
    for name in ("majority", "head", "lora"):
        assert matched[name] == methods[name]
    nearest_ept = nearest(moepeft.method("ept", num_tasks=2), sites, found.target_parameters)
    assert matched["ept"].config() == Moepeft("ept", nearest_ept.factory).config()
    assert {name for name, method in matched.items() if isinstance(method, Refused)} - {"ept"} == {"full", "peft:dora"}
    with pytest.raises(Unsupported, match="no size to choose"):
        matched["full"].check()
    assert not matched["full"].trains
    # A target of one's own comes before the reference, and is all it takes.
    found, matched = apply_track(suite(reference=None, target_parameters=20_000), methods, source)
    assert found.target_parameters == 20_000
    assert abs(matched["lora"].count(sites) - 20_000) <= 1000


def test_lora_takes_the_size_of_another_method_as_that_method_takes_the_size_of_lora():
    methods = parse_methods(
        (
            "lora",
            "moelora",
        ),
        num_tasks=2,
    )
    source = find_backbone("tiny-bert")
    sites = backbone_sites(source, "encoder")
    for reference, other in (("lora", "moelora"), ("moelora", "lora")):
        own = methods[reference].count(sites)
        found, matched = apply_track(suite(reference=reference), methods, source)
        assert found.target_parameters == own == matched[reference].count(sites)
        assert matched[other].count(sites) == pytest.approx(own, rel=TOLERANCE)
        assert matched[other].config() != methods[other].config()


@pytest.mark.parametrize("reference", ["peft:dora", "full", "head"])
def test_a_reference_without_a_closed_form_needs_a_target(reference):
    with pytest.raises(UsageError, match="--target-parameters"):
        apply_track(suite(reference=reference), parse_methods(("lora",), num_tasks=2), find_backbone("tiny-bert"))


def test_the_published_track_leaves_all_as_they_are():
    methods = parse_methods(("lora",), num_tasks=2)
    assert apply_track(suite(track="as-published"), methods, find_backbone("tiny-bert")) == (
        suite(track="as-published"),
        methods,
    )


def test_sites_need_no_weights():
    with_weights = sites_of("minilm")
    assert backbone_sites(find_backbone("minilm"), "encoder") == with_weights


def test_tracks_never_share_a_table():
    methods = parse_methods(("lora",), num_tasks=2)
    made, _ = make_record("alpha")
    cells = [
        planned
        for fields in ({}, {"target_parameters": 1000}, {"track": "as-published"})
        for planned in expand(suite(**fields).protocol, methods.values(), (), (0,))
    ]
    assert len(group_records(made.model_copy(update={"cell": planned.cell}) for planned in cells)) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reference": None}, "needs target_parameters, or a reference"),
        ({"track": "as-published", "target_parameters": 5}, "target_parameters is for track = matched"),
        ({"target_parameters": 0}, "greater than 0"),
    ],
)
def test_a_track_without_a_size_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        suite(**fields)


def test_flags():
    found = resolve_suite(Options(track="matched", target_parameters=400_000))
    assert (found.track, found.target_parameters) == ("matched", 400_000)
    assert resolve_suite(Options()).track == "as-published"
