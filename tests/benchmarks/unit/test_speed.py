"""``python -m benchmarks.speed``: arithmetic on made-up numbers, and short real runs on tiny shapes."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moepeft
from benchmarks.instruments.clock import CUDA_BURST, Step, interleave, paired_ratio, quantiles
from benchmarks.protocols.errors import UsageError
from benchmarks.speed import __main__ as speed
from benchmarks.speed.contestants import (
    FROZEN,
    Contestant,
    Entry,
    adapted,
    enter,
    frozen,
    merged,
    reference,
    reference_label,
)
from benchmarks.speed.costs import measure_costs
from benchmarks.speed.growth import REFERENCE, VALUES, NotOnAxis, fit_exponent, scaled, workload_at
from benchmarks.speed.hosts import FeedForward, build_host, kind_of, sharing_copy
from benchmarks.speed.options import Options, find_definitions
from benchmarks.speed.tables import milliseconds
from benchmarks.speed.workloads import Workload, make_step, supports
from moepeft.fast import fast_paths_enabled
from moepeft.sites import find_sites
from tests.library.property.test_fast_paths import called_by

CPU = torch.device("cpu")


def tiny(name: str, **more: Any) -> nn.Module:
    return build_host(name, layers=None, device=CPU, dtype=torch.float32, **more)


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The four models' classes at sizes that run in milliseconds, under their own names."""
    from benchmarks.backbones import shapes
    from tests.support import hosts

    sizes = {"minilm": hosts.bert, "t5-base": hosts.t5, "llama-2-7b": hosts.llama, "deberta-v3-base": hosts.deberta}
    monkeypatch.setattr(shapes, "SHAPES", sizes)


def attached(host: nn.Module, spec: str, sites: Any = None, **fields: Any) -> Contestant:
    return adapted(spec, host, Entry(moepeft.method(spec, **fields)), sites, compiled=False)


def run(*words: str) -> int:
    return speed.main([*words, "--warmup", "1", "--repeats", "2", "--rows", "4", "--length", "5"])


# ---------------------------------------------------------------------- arithmetic


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    reference_seconds = [1.0, 2.0, 4.0, 8.0]  # a machine that slows down
    ratio = paired_ratio([1.5, 3.0, 6.0, 16.0], reference_seconds)
    assert ratio.estimate == 1.5
    assert (ratio.low, ratio.high) == (1.5, 2.0)
    same = paired_ratio(reference_seconds, reference_seconds)
    assert (same.estimate, same.low, same.high) == (1, 1, 1)


def test_the_ratios_interval_covers() -> None:
    """Of 200 pairs of noisy series, about 95 % of the intervals hold the true ratio."""
    noise = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        first, second = (value * np.exp(noise.normal(0, 0.1, size=31)) for value in (1.2, 1.0))
        ratio = paired_ratio(list(first), list(second))
        covered += ratio.low <= 1.2 <= ratio.high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize("other", [[], [1.0]])
def test_ratio_refuses_unpaired_rounds(other: list[float]) -> None:
    with pytest.raises(ValueError, match="same rounds"):
        paired_ratio(other, [1.0, 2.0][: 2 * len(other)])


def test_quantiles() -> None:
    found = quantiles([float(number) for number in range(1, 12)])
    assert (found.p10, found.median, found.p90, found.repeats) == (2, 6, 10, 11)


@pytest.mark.parametrize("power", [-0.5, 0.0, 1.0, 2.0])
def test_exponent_of_a_power_law(power: float) -> None:
    values = VALUES["experts"]
    assert fit_exponent(values, [3 * value**power for value in values]) == pytest.approx(power)


def test_exponent_of_noisy_points_is_least_squares() -> None:
    slope = np.linalg.lstsq(np.stack([np.log([1, 2, 4]), np.ones(3)], axis=1), np.log([1, 3, 5]), rcond=None)[0][0]
    assert fit_exponent([1, 2, 4], [1, 3, 5]) == pytest.approx(slope)
    assert fit_exponent([8], [1.0]) is None


@pytest.mark.parametrize(
    ("seconds", "shown"), [(1.0, "1,000"), (0.1485, "148"), (0.0006, "0.600"), (0.005, "5.00"), (12.3456, "12,346")]
)
def test_three_digits(seconds: float, shown: str) -> None:
    assert milliseconds(seconds) == shown


# ---------------------------------------------------------------------- turns


def test_steps_take_turns_and_a_failing_one_is_left_out() -> None:
    log: list[str] = []

    def fail() -> None:
        log.append("c")
        raise RuntimeError("no more")

    steps = [Step("a", lambda: log.append("a")), Step("b", lambda: log.append("b")), Step("c", fail)]
    timings = interleave(steps, warmup=1, repeats=2, device=CPU)
    assert "".join(log) == "abcbaab"  # each round begins with another
    assert {label: len(seconds) for label, seconds in timings.seconds.items()} == {"a": 2, "b": 2}
    assert str(timings.failures["c"]) == "no more"


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_only_the_run_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    @contextmanager
    def around() -> Iterator[None]:
        clock.spend(100)
        yield
        clock.spend(100)

    slow = Step("slow", lambda: clock.spend(2), prepare=lambda: clock.spend(50), around=around)
    assert interleave([slow], warmup=0, repeats=2, device=CPU, settle=1).seconds == {"slow": [2, 2]}


def test_small_steps_do_not_pay_for_what_others_left_in_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step after another contestant's takes longer, and the more so the more others there were."""
    clock, last = Clock(monkeypatch), [""]

    def small(name: str, others: int) -> Step:
        def run() -> None:
            clock.spend(2 if last[0] == name else 2 + others)
            last[0] = name

        return Step(name, run)

    settle = Workload("host", 4, 16, 8).settle
    for company in ("ab", "abcdefgh"):
        steps = [small(name, len(company)) for name in company]
        seconds = interleave(steps, warmup=0, repeats=3, device=CPU, settle=settle).seconds
        assert set(map(tuple, seconds.values())) == {(2, 2, 2)}


def test_a_turn_on_a_gpu_is_several_steps_between_two_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host queues work of 3 s in 1 s; what one contestant leaves in the queue is not the next one's time."""
    clock, queue = Clock(monkeypatch), [0.0]

    def queue_step(seconds: float) -> None:
        clock.spend(1)
        queue[0] = max(queue[0], clock.now) + seconds

    def wait(device: torch.device) -> None:
        clock.now = max(clock.now, queue[0])

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    steps = [Step("a", lambda: queue_step(3)), Step("b", lambda: queue_step(5), prepare=lambda: queue_step(7))]
    timings = interleave(steps, warmup=1, repeats=2, device=torch.device("cuda"))
    for label, seconds in (("a", 3), ("b", 5)):
        # The first step's second on the host is shared by all of a turn.
        assert timings.seconds[label] == [pytest.approx((1 + CUDA_BURST * seconds) / CUDA_BURST)] * 2


def test_equal_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="different labels"):
        interleave([Step("a", lambda: None)] * 2, warmup=0, repeats=1, device=CPU)


# ---------------------------------------------------------------------- contestants


def test_contestants_share_the_weights_and_nothing_else() -> None:
    host = tiny("32x48")
    other = sharing_copy(host)
    assert [p.data_ptr() for p in other.parameters()] == [p.data_ptr() for p in host.parameters()]
    attached(other, "lora")
    assert len(list(host.parameters())) == 1


def test_the_reference_adapts_the_same_sites_with_as_many_parameters() -> None:
    host = tiny("minilm")
    unit = reference(host, ["q", "v"], compiled=False)
    ours = attached(host, "lora", ["q", "v"], rank=8)
    assert sum(p.numel() for p in unit.parameters) == sum(p.numel() for p in ours.parameters)
    assert len(unit.parameters) == len(ours.parameters) == 2 * 12
    assert unit.label == reference_label() == "peft LORA r=8"


def test_merged_only_during_its_turn() -> None:
    host = tiny("32x48")
    contestant = attached(host, "lora")
    for parameter in contestant.parameters:
        nn.init.ones_(parameter)
    before = host[0].weight.clone()  # type: ignore[index]
    folded = merged(contestant)
    assert folded is not None
    with folded.turn():
        assert not torch.equal(host[0].weight, before)  # type: ignore[index]
    assert torch.equal(host[0].weight, before)  # type: ignore[index]
    assert folded.task_ids(5, 3).tolist() == [0] * 5
    assert contestant.task_ids(5, 3).tolist() == [0, 0, 1, 1, 2]
    assert merged(attached(tiny("32x48"), "tucka")) is None


def test_a_twin_has_its_turn_without_fast_paths() -> None:
    entries = enter({"more": moepeft.method("more", num_tasks=2)}, {"all": None})
    assert list(entries) == ["more", "more (definition)"]
    host = tiny("32x48")
    seen = {}
    for label, entry in entries.items():
        contestant = adapted(label, host, entry, None, compiled=False)
        contestant.model.register_forward_hook(lambda *_, label=label: seen.update({label: fast_paths_enabled()}))
        step = make_step(contestant, host, Workload("train", 4, 5, 2))
        interleave([step], warmup=0, repeats=1, device=CPU)
        assert fast_paths_enabled()
    assert seen == {"more": True, "more (definition)": False}


def test_a_twin_may_lack_one_fast_path() -> None:
    """The others stay: seen by the functions that run."""
    name = "methods._contrastive.contrastive_task_loss"
    entries = enter({"more": moepeft.method("more", num_tasks=2)}, find_definitions(Options(definitions=(name,))))
    label = f"more ({name} by definition)"
    assert list(entries) == ["more", label]
    host, names = tiny("32x48"), {}
    for each, entry in entries.items():
        contestant = adapted(each, host, entry, None, compiled=False)
        step = make_step(contestant, host, Workload("train", 4, 5, 2))
        with contestant.turn():
            names[each] = {code.co_qualname for code in called_by(step.run)}
            assert fast_paths_enabled()
    assert {"_sum_over_sites", "route_rows"} <= names["more"]
    assert "_sum_over_sites" not in names[label]
    assert "route_rows" in names[label]


def test_layers_are_cut_and_dropout_is_off(small_models: None) -> None:
    for name, streams in (("minilm", 1), ("t5-base", 2), ("llama-2-7b", 1), ("deberta-v3-base", 1)):
        whole = tiny(name)
        cut = build_host(name, layers=1, device=CPU, dtype=torch.bfloat16)
        blocks = [{(site.name.split(".")[0], site.layer) for site in find_sites(model)} for model in (whole, cut)]
        layers = [{layer for _, layer in found if layer is not None} for found in blocks]
        assert layers == [{0, 1}, {0}]
        assert len([1 for key, layer in blocks[1] if layer == 0]) == streams
        assert {p.dtype for p in cut.parameters()} == {torch.bfloat16}
        assert not any(module.p for module in whole.modules() if isinstance(module, nn.Dropout))
        assert [n for n, _ in tiny(name).named_parameters()] == [n for n, _ in whole.named_parameters()]
    with pytest.raises(UsageError, match="has 2 layers"):
        build_host("minilm", layers=3, device=CPU, dtype=torch.float32)


def test_kinds(small_models: None) -> None:
    kinds = {name: kind_of(tiny(name)) for name in ("32x48", "minilm", "t5-base", "llama-2-7b", "deberta-v3-base")}
    assert list(kinds.values()) == ["layer", "encoder", "seq2seq", "causal", "encoder"]
    assert [supports(kind, "decode") for kind in kinds.values()] == [False, False, True, True, False]


# ---------------------------------------------------------------------- work and its costs


@pytest.mark.parametrize("name", ["minilm", "t5-base", "llama-2-7b", "deberta-v3-base"])
def test_frozen_goes_backward_to_the_embeddings(small_models: None, name: str) -> None:
    host = tiny(name)
    contestant = frozen(host, compiled=False, backward=True)
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(seen.append)

    for module in contestant.model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == host.config.vocab_size:
            module.register_forward_hook(note)
    make_step(contestant, host, Workload("train", 2, 5, 1)).run()
    assert seen
    assert all(bool(gradient.any()) for gradient in seen)
    assert all(p.grad is None for p in contestant.model.parameters())


def test_decoding_gives_what_the_whole_sequence_gives(small_models: None) -> None:
    """The timed step continues the prompt's cache, again and again from the same place."""
    for name in ("t5-base", "llama-2-7b"):
        host = tiny(name).eval()
        outputs = []
        contestant = frozen(host, compiled=False, backward=False)
        contestant.model.register_forward_hook(lambda module, args, output, to=outputs: to.append(output.logits))
        step = make_step(contestant, host, Workload("decode", 2, 5, 1))
        prompt = outputs.pop()
        for _ in range(3):
            step.prepare()
            step.run()
        assert prompt.shape[0] == 2
        assert [logits.shape[1] for logits in outputs] == [1, 1, 1]
        assert torch.equal(outputs[0], outputs[2])


def test_operations_and_saved_bytes_of_a_layer() -> None:
    """Hand-worked: 20 tokens through 32 -> 48 are 20*32*48 multiply-adds forward and as many backward."""
    host = tiny("32x48")
    work = Workload("train", 4, 5, 1)
    for backward, products in ((False, 1), (True, 2)):
        bare = frozen(host, compiled=False, backward=backward)
        step = make_step(bare, host, work)
        assert measure_costs(bare, step, step, CPU).flops == products * 2 * 20 * 32 * 48
    unit = reference(host, None, compiled=False)
    unit.model.train()
    step = make_step(unit, host, work)
    costs = measure_costs(unit, step, step, CPU)
    pair = 32 * 8 + 8 * 48
    assert costs.flops == 2 * 20 * (2 * 32 * 48 + 3 * pair)
    # Of the update, its input (20, 32) and rank space (20, 8) are kept; of the loss, the output (20, 48).
    assert costs.saved_bytes == 4 * 20 * (32 + 8 + 48)


def test_kernels_of_a_layer() -> None:
    """By hand: a product for the bare layer, and for the reference two more, the scale and the sum."""
    host = tiny("32x48")
    work = Workload("prefill", 4, 5, 1)
    for contestant, kernels in (
        (frozen(host, compiled=False, backward=False), 1),
        (reference(host, None, compiled=False), 5),
    ):
        step = make_step(contestant, host, work, counted=True)
        assert measure_costs(contestant, step, step, CPU).kernels == kernels


def test_counting_leaves_parameters_as_they_were() -> None:
    host = tiny("32x48")
    ours = attached(host, "more", num_tasks=2)
    ours.model.eval()
    step = make_step(ours, host, Workload("prefill", 4, 5, 2), counted=True)
    assert measure_costs(ours, step, step, CPU).flops > 2 * 20 * 32 * 48
    assert all(p.requires_grad for p in ours.parameters)


def test_tokens_of_a_step() -> None:
    assert Workload("train", 4, 5, 1).tokens("encoder") == 20
    assert Workload("train", 4, 5, 1).tokens("seq2seq") == 40
    assert Workload("prefill", 4, 5, 1).tokens("seq2seq") == 20
    assert Workload("decode", 4, 5, 1).tokens("causal") == 4


OPERATIONS = tomllib.loads(Path(__file__).with_name("operations.toml").read_text())


def count_operations(host: nn.Module, contestant: Contestant) -> int:
    contestant.model.train()
    step = make_step(contestant, host, Workload("host", 4, 16, 8))
    step.run()  # a method may look at its first batch
    return measure_costs(contestant, step, step, CPU).kernels


@pytest.fixture(scope="module")
def tiny_llama() -> tuple[nn.Module, int]:
    """The host of ``--mode host``, and the operations of its frozen step."""
    host = tiny("llama-2-7b", tiny=True)
    return host, count_operations(host, frozen(host, compiled=False, backward=True))


@pytest.mark.parametrize("name", moepeft.available())
def test_no_methods_operations_grow_unnoticed(tiny_llama: tuple[nn.Module, int], name: str) -> None:
    """Whoever makes a method leaner lowers its number in operations.toml; whoever needs more says so there."""
    assert name in OPERATIONS, f"operations.toml has no number for {name}: count its operations and write them down"
    host, without = tiny_llama
    contestant = attached(host, name, num_tasks=8)
    assert (count_operations(host, contestant) - without) / contestant.sites <= OPERATIONS[name]


def test_operations_per_site_are_those_above_the_frozen_model(tmp_path: Path) -> None:
    arguments = ["--backbone", "llama-2-7b", "--methods", "lora", "--mode", "host"]
    assert run(*arguments, "--results", str(tmp_path), "--json", str(tmp_path / "x.json")) == 0
    (group,) = json.loads((tmp_path / "x.json").read_text())["groups"]
    assert (group["workload"]["rows"], group["workload"]["length"]) == (4, 16)
    rows = {row["label"]: row for row in group["rows"]}
    kernels = {label: row["costs"]["kernels"] for label, row in rows.items()}
    assert rows["lora"]["operations_per_site"] == (kernels["lora"] - kernels[FROZEN]) / (2 * 7)
    assert rows[FROZEN]["operations_per_site"] is None
    assert "operations per site" in (tmp_path / "tables" / "speed-host-llama-2-7b-cpu.md").read_text()


# ---------------------------------------------------------------------- growth


def test_scaling_finds_each_methods_field() -> None:
    experts = {
        name: scaled(moepeft.method(name, **fields), "experts", 4)
        for name, fields in (("moelora", {}), ("mixlora", {}), ("tucka", {}), ("ept", {}))
    }
    assert experts["moelora"].num_experts == experts["mixlora"].num_experts == experts["tucka"].experts == 4
    assert experts["ept"].kernels == (2, 4, 6, 8)
    assert scaled(moepeft.method("ept"), "experts", 6).kernels == (2, 2, 4, 4, 6, 8)
    assert scaled(moepeft.method("more"), "rank", 64).rank == 64
    assert scaled(moepeft.method("more"), "tasks", 64).num_tasks == 64
    for axis in ("experts", "tasks"):
        with pytest.raises(NotOnAxis, match="lora"):
            scaled(moepeft.method("lora"), axis, 4)
    with pytest.raises(NotOnAxis, match="not a multiple"):
        scaled(moepeft.method("moelora"), "rank", 4)


def test_work_along_the_axes() -> None:
    work = Workload("train", 32, 64, 8)
    assert workload_at(work, "experts", 4) == work
    assert workload_at(work, "length", 512).length == 512
    at_tasks = workload_at(work, "tasks", 64)
    assert (at_tasks.rows, at_tasks.tasks, at_tasks.rows * at_tasks.length) == (512, 64, 32 * 64)


def test_growth_command(tmp_path: Path) -> None:
    code = run(
        "--grow", "rank,experts", "--backbone", "16x16", "--methods", "lora,mixlora", "--results", str(tmp_path),
        "--json", str(tmp_path / "all.json"),
    )  # fmt: skip
    assert code == 0
    text = (tmp_path / "tables" / "speed-growth-16x16-cpu.md").read_text()
    assert "rank 64" in text
    assert "experts 64" in text
    figures = json.loads((tmp_path / "all.json").read_text())["growth"]
    ranks = figures["rank"]
    assert list(ranks["rows"]) == [FROZEN, REFERENCE, "lora", "mixlora"]
    medians = [row["quantiles"]["median"] for row in ranks["rows"]["lora"].values()]
    assert ranks["exponents"]["lora"] == pytest.approx(fit_exponent(VALUES["rank"], medians))
    assert ranks["rows"]["mixlora"]["64"]["parameters"] == 8 * 64 * (16 + 16) * 2 + 8 * 16  # a network of two layers
    assert {row["status"] for row in figures["experts"]["rows"]["lora"].values()} == {"unsupported"}
    assert figures["experts"]["exponents"]["lora"] is None


def test_the_network_is_one_feed_forward_block() -> None:
    assert {site.role for site in find_sites(FeedForward(8))} == {"up", "down"}
    assert len({site.block for site in find_sites(FeedForward(8))}) == 1


# ---------------------------------------------------------------------- the command


def test_comparison_on_a_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(
        "--backbone", "32x48", "--methods", "lora,ept,mixlora", "--definitions", "all", "--mode", "train,prefill",
        "--inference-rows", "1,3", "--results", str(tmp_path), "--json", str(tmp_path / "all.json"),
    )  # fmt: skip
    assert code == 0  # a method that cannot adapt a single layer is no failure
    table = (tmp_path / "tables" / "speed-32x48-cpu.md").read_text()
    assert table.startswith("<!-- Made by `python -m benchmarks.speed --backbone 32x48")
    assert table in capsys.readouterr().out
    assert "mixlora: unsupported" in table
    assert "1 thread" in table or "threads" in table
    figures = json.loads((tmp_path / "all.json").read_text())
    groups = {(group["workload"]["mode"], group["workload"]["rows"]): group["rows"] for group in figures["groups"]}
    labels = {key: [row["label"] for row in rows] for key, rows in groups.items()}
    bare, unit = "frozen, forward only", reference_label()
    assert labels[("train", 4)] == [bare, FROZEN, unit, "lora", "lora (definition)", "ept", "ept (definition)"]
    merged_too = [name for one in ("lora", "ept") for name in (one, f"{one} (merged)", f"{one} (definition)")]
    inference = [FROZEN, unit, *merged_too]
    assert labels[("prefill", 1)] == labels[("prefill", 3)] == inference
    for rows in groups.values():
        for row in rows:
            assert row["status"] == "ok", row["reason"]
            assert len(row["seconds"]) == 2
            assert row["quantiles"]["median"] == pytest.approx(np.median(row["seconds"]))
            assert row["mfu"] is None
        (unit_row,) = (row for row in rows if row["label"] == unit)
        assert unit_row["ratio"]["estimate"] == 1
        frozen_flops = next(row["costs"]["flops"] for row in rows if row["label"] == FROZEN)
        for row in rows:
            if row["label"].endswith("(merged)"):
                assert row["costs"]["flops"] == frozen_flops


def test_share_of_the_peak(tmp_path: Path) -> None:
    arguments = ["--backbone", "32x48", "--methods", "lora", "--mode", "train", "--peak-tflops", "0.5"]
    assert run(*arguments, "--optimiser", "--results", str(tmp_path), "--json", str(tmp_path / "x.json")) == 0
    (group,) = json.loads((tmp_path / "x.json").read_text())["groups"]
    for row in group["rows"]:
        assert row["mfu"] == pytest.approx(2 * 2 * 20 * 32 * 48 / row["quantiles"]["median"] / 0.5e12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("minilm", "bf16", marks=pytest.mark.exhaustive),
        pytest.param("t5-base", "fp32", marks=pytest.mark.exhaustive),
        ("llama-2-7b", "bf16"),
        ("deberta-v3-base", "fp32"),
    ],
)
def test_every_mode_on_every_kind_of_model(small_models: None, tmp_path: Path, name: str, dtype: str) -> None:
    fields = {"mixlora": "mixlora@rank=2", "ept": "ept@kernels=[1,2]"}
    methods = [fields.get(method, method) for method in moepeft.available()]
    code = run(
        "--backbone", name, "--inference-rows", "2", "--tasks", "3", "--methods", ",".join(methods),
        "--dtype", dtype, "--results", str(tmp_path), "--json", str(tmp_path / "x.json"),
    )  # fmt: skip
    assert code == 0
    groups = json.loads((tmp_path / "x.json").read_text())["groups"]
    generates = name in ("t5-base", "llama-2-7b")
    assert [group["workload"]["mode"] for group in groups] == ["train", "prefill", *(["decode"] if generates else [])]
    for group in groups:
        labels = [row["label"] for row in group["rows"]]
        assert set(methods) <= set(labels)
        failed = {row["label"]: row["reason"] for row in group["rows"] if row["status"] != "ok"}
        # DeBERTa's table of positions goes through the projections, so that tasks cannot be merged there.
        assert all(name == "deberta-v3-base" and "(merged)" in label for label in failed), failed


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called is the compiled module, and merged models are left out."""
    compiled = []

    def compile_and_note(model: nn.Module, mode: str) -> Any:
        compiled.append(mode)
        return model

    monkeypatch.setattr(torch, "compile", compile_and_note)
    arguments = ["--backbone", "8x8", "--methods", "tucka", "--mode", "prefill", "--inference-rows", "1", "--compile"]
    assert run(*arguments, "--results", str(tmp_path)) == 0
    assert compiled == ["default"] * 4  # the bare model twice, the reference, the method
    assert "(merged)" not in (tmp_path / "tables" / "speed-8x8-compile-cpu.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "nothing"], "unknown shape 'nothing'"),
        (["--methods", "lorra"], "Did you mean"),
        (["--methods", ","], "names no method"),
        (["--mode", "decode"], "does not generate"),
        (["--grow", "rank", "--backbone", "minilm"], "INxOUT"),
        (["--rows", "0"], "--rows 0"),
        (["--mode", "host,train"], "--mode host"),
        (["--mode", "host", "--backbone", "8x8"], "--mode host"),
        (["--warmup", "-1"], "--warmup -1"),
        (["--peak-tflops", "0"], "--peak-tflops 0"),
        (["--inference-rows", "1,0"], "--inference-rows"),
        (["--methods", "ept@rnk=2"], "Did you mean rank"),
        (["--definitions", "ops.linear.nothing"], "has no attribute"),
        (["--definitions", "ops.linear.per_row"], "has no fast path"),
        (["--definitions", "methods.tucka.correct_input", "--compile"], "all fast paths or none"),
        (["--backbone", "8x8", "--layers", "1"], "single layer"),
        (["--sites", "nowhere"], "matches none"),
    ],
)
def test_wrong_usage_is_one_line(
    small_models: None, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speed.main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert len(output.err.splitlines()) == 1
    assert output.out == ""


def test_a_table_of_its_own_for_what_does_not_compare() -> None:
    stems = [
        Options(backbone="minilm", **options).stem
        for options in ({}, {"dtype": "bf16"}, {"compile": True}, {"layers": 2})
    ]
    assert stems == ["speed-minilm", "speed-minilm-bf16", "speed-minilm-compile", "speed-minilm-2layers"]
    assert Options(grow=("rank",)).stem == "speed-growth-768x768"


def test_kept_memory_costs_no_page_faults():
    """In a process of its own: what is set stays set."""
    lines = (
        "import resource, torch",
        "from benchmarks.instruments.processor import keep_free_memory",
        "keep_free_memory(torch.device('cpu'))",
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt",
        "def round():",
        "    before = faults()",
        "    torch.empty(10_000_000).fill_(1)",
        "    return faults() - before",
        "print(min(round() for _ in range(20)))",
    )
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    if platform.libc_ver()[0] == "glibc":  # the only one that can be told
        # 40 MB are 10,000 pages: given back, each round would touch them all. A system that takes memory away from idle
        # processes disturbs some rounds, and not all.
        assert int(found.stdout) < 1_000
