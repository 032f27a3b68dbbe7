"""Published counts beside ours."""

from __future__ import annotations

import pytest

from benchmarks.claims import Claim, Counts, measure, read_claims, search, verdict

CLAIMS = read_claims()


def test_enough_published_numbers_each_with_its_source() -> None:
    published = [claim for claim in CLAIMS if claim.value is not None]
    assert len(published) >= 18
    assert all(claim.source for claim in CLAIMS)


@pytest.mark.slow
@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.shape != "llama-2-7b" and c.value is not None], ids=str)
def test_small_models_reproduce_every_published_number(claim: Claim) -> None:
    assert verdict(claim, measure(claim)).startswith("reproduced")


def test_a_number_of_another_setting_is_unexplained() -> None:
    claim = next(claim for claim in CLAIMS if claim.what == "one 768x768 site")
    other = claim.model_copy(update={"value": 6385.0})
    assert verdict(claim, measure(claim)).startswith("reproduced")
    assert verdict(other, measure(other), "searched in vain") == "unexplained: searched in vain"


@pytest.mark.slow
def test_one_more_task_and_merging() -> None:
    counts = {claim.method: measure(claim) for claim in CLAIMS if claim.shape == "t5-base" and claim.tasks == 8}
    assert counts["lora"].one_more_task == 0
    inputs = 12 * (4 * 768 + 768 + 3072) + 12 * (8 * 768 + 768 + 3072)  # of the encoder's sites, of the decoder's
    assert counts["more"].one_more_task == inputs
    assert counts["more"].merged == 0 < counts["mixlora"].merged


def test_a_share_counts_frozen_and_trainable_numbers() -> None:
    claim = Claim(what="", method="lora", fields={}, shape="8x8", tasks=1, value=2.9, decimals=1, share=True, source="")
    counts = Counts(per_task={}, one_more_task=0, merged=0, share=2.94)
    assert verdict(claim, counts).startswith("reproduced")
    assert verdict(claim, counts.model_copy(update={"share": 2.96})).startswith("unexplained")


def test_a_search_finds_the_setting_of_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows made from one setting: the search must come back with the setting."""
    for name, few in (("SITE_SETS", ("q v", "up")), ("RANKS", (4, 8)), ("TASKS", range(3, 5))):
        monkeypatch.setattr(f"benchmarks.claims.{name}", few)
    common = {"fields": {}, "shape": "llama-2-7b", "tasks": 1, "unit": 1.0, "source": ""}
    lora = 64 * 8 * 2 * 4096 // 4
    more = (64 * (8 * 2 * 4096 + 8 * 4097 + 4 * 4096)) / 4
    rows = [Claim(what="", method="lora", value=lora, **common), Claim(what="", method="more", value=more, **common)]
    monkeypatch.setattr(Claim, "prints", lambda self, count, unit: count == self.value)
    assert "q v, r = 8, 4 tasks" in search(rows)
