"""What papers say of their methods, and what the records here say of the same: `claims.toml`, tested."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from scipy import stats
from statsmodels.stats.multitest import multipletests

from benchmarks.mechanisms.tables import interval, multiplier
from benchmarks.reporting.comparison import AT_EDGE, compare_pair
from benchmarks.reporting.tuning import find_trials
from benchmarks.verdict.evidence import Evidence, Link, Study, merges

CLAIMS = Path(__file__).with_name("claims.toml")
LEVEL = 0.05

Ruling = Literal["reproduced", "not reproduced", "refuted here", "undecided here", "untested here"]


@dataclass(frozen=True)
class Found:
    """What the records say of one claim.

    Attributes:
        words: the numbers, or why there are none.
        p: two-sided, of no effect; None where nothing is tested.
        holds: whether the effect has the claimed sign, or the count is the claimed one; None: nothing was measured.
        evidence: where the numbers stand.
    """

    words: str
    p: float | None = None
    holds: bool | None = None
    evidence: tuple[Link, ...] = ()


class _Claim(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    source: str


class SuiteClaim(_Claim):
    """A method scores above another one in a suite; the first suite that has both is taken."""

    kind: Literal["suite"]
    suites: tuple[str, ...]
    method: str
    than: str

    def test(self, evidence: Evidence) -> Found:
        """The endpoint's difference over the seeds that both have, under the protocol with the most steps."""
        for study in (study for suite in self.suites for study in evidence.find_studies(suite)):
            found = self._compare(study)
            if found is not None:
                return found
        return Found(f"no committed runs of {self.method} and {self.than} under one protocol")

    def _compare(self, study: Study) -> Found | None:
        endpoint = study.endpoint
        difference = compare_pair(study.frame, study.outcomes, self.method, self.than, endpoint)
        if difference is None:
            return None
        words = (
            f"{study.folder.name}, {study.steps} steps, {difference.seeds} seeds: "
            f"{100 * difference.estimate:+z.1f} ± {100 * difference.half_width:.1f} points"
        )
        links = (Link(study.folder.name, f"{study.folder.name}/tables/scores.md"),)
        edges = {trials.method for trials in find_trials(study.frame, endpoint) if trials.at_edge}
        if edges & {self.method, self.than}:
            return Found(f"{words}; no verdict, a rate is {AT_EDGE}", None, None, links)
        if difference.seeds < 2:
            return Found(words, None, None, links)
        return Found(words, difference.p_value, difference.estimate > 0, links)


class ExperimentClaim(_Claim):
    """A column of an experiment's frame is above another method's, or above the bound, or above 0."""

    kind: Literal["experiment"]
    experiment: str
    where: dict[str, Any]
    measure: str
    method: str
    than: str | None = None
    below: bool = False

    def test(self, evidence: Evidence) -> Found:
        """Paired t over the seeds of one teacher."""
        mechanism = evidence.mechanisms.get(self.experiment)
        if mechanism is None:
            return Found(f"the experiment {self.experiment} has no committed runs")
        rows = mechanism.at(**self.where)
        own = _by_seed(rows, self.method, self.measure)
        other = self._other(rows)
        difference = own - other
        if len(own) < 2 or difference.empty or len(difference.dropna()) == 0:
            return Found(f"the experiment {self.experiment} has no runs of {self.method} and {self.than}")
        link = self._link()
        if difference.isna().any():
            words = f"{self.experiment}: no verdict, {int(difference.isna().sum())} of {len(difference)} pairs failed"
            return Found(words, evidence=(link,))
        if rows.loc[rows["method"].isin([self.method, self.than]), "at_edge"].any():
            return Found(f"{self.experiment}: no verdict, a rate is {AT_EDGE}", evidence=(link,))
        mean, half = interval(difference.tolist())
        p = 0.0 if difference.std() == 0 else float(stats.ttest_1samp(difference, 0.0).pvalue)
        words = f"{self.experiment}, {len(difference)} seeds: {mean:+.3f} ± {half:.3f}"
        return Found(words, p if mean else 1.0, (mean < 0) == self.below and mean != 0, (link,))

    def _link(self) -> Link:
        table = "scores" if self.measure == "score" else self.measure.replace("_", "-")
        return Link(self.experiment, f"mechanisms/tables/{self.experiment}-{table}.md")

    def _other(self, rows: pd.DataFrame) -> Any:
        if self.than is None:
            return 0.0
        return _by_seed(rows, self.method, "bound") if self.than == "bound" else _by_seed(rows, self.than, self.measure)


class MultiplierClaim(_Claim):
    """A method reaches the reference's score with fewer parameters."""

    kind: Literal["multiplier"]
    experiment: str
    where: dict[str, Any]
    method: str

    def test(self, evidence: Evidence) -> Found:
        """The multiplier at the middle rank, by a sign test over seeds: it takes six seeds at least to decide."""
        mechanism = evidence.mechanisms.get(self.experiment)
        rows = pd.DataFrame({"method": []}) if mechanism is None else mechanism.at(**self.where)
        if mechanism is None or self.method not in set(rows["method"]):
            return Found(f"the experiment {self.experiment} has no committed runs of {self.method}")
        experiment = mechanism.asked.experiment
        rank = experiment.ranks_of_reference[len(experiment.ranks_of_reference) // 2]
        link = (Link(self.experiment, f"mechanisms/tables/{self.experiment}-multipliers.md"),)
        logs = np.array(
            [
                multiplier(rows[rows["seed"] == seed], experiment.reference, self.method, rank)
                for seed in experiment.seeds
            ]
        )
        logs = logs[~np.isnan(logs)]  # a seed on which the reference failed has no sign
        where = f"{self.experiment}, {len(logs)} seeds, score of {experiment.reference} at rank {rank}"
        if not len(logs):
            return Found(f"{where}: {experiment.reference} failed", evidence=link)
        # A score that no size reaches has no number, but it has a sign.
        fewer = int((logs > 0).sum())
        p = float(stats.binomtest(fewer, len(logs)).pvalue)
        if 0.5 ** (len(logs) - 1) > LEVEL:
            where += ", too few for a sign test to decide"
        finite = logs[np.isfinite(logs)]
        if 2 * (logs == -np.inf).sum() >= len(logs):
            return Found(f"{where}: not reached at any size on {int((logs == -np.inf).sum())} seeds", p, False, link)
        told = f"{np.exp(finite.mean()):.2g} times fewer parameters" if len(finite) else "its smallest size reaches it"
        return Found(f"{where}: {told}", p, 2 * fewer > len(logs), link)


class CountClaim(_Claim):
    """A number of parameters."""

    kind: Literal["count"]
    setting: str
    methods: tuple[str, ...]

    def test(self, evidence: Evidence) -> Found:
        """The verdicts of `python -m benchmarks.claims`."""
        counts = evidence.counts
        if counts.empty:
            return Found("the table of counts is missing: `python -m benchmarks.claims`")
        rows = counts[(counts["setting"] == self.setting) & counts["method"].isin(self.methods)]
        rows = rows[rows["source"].str.contains("run") == False]  # noqa: E712  a column of booleans
        said = [f"{row['method']} {row['verdict'].split(':')[0]}" for _, row in rows.iterrows()]
        holds = len(rows) > 0 and rows["verdict"].str.startswith("reproduced").all()
        return Found(f"counts: {', '.join(said)}", None, bool(holds), (Link("counts", "tables/claims.md"),))


class MergeClaim(_Claim):
    """An update folds into the weights."""

    kind: Literal["merges"]
    method: str

    def test(self, evidence: Evidence) -> Found:
        """Whether merged inference takes what the frozen model's takes: their 95 % intervals overlap in every table."""
        if not merges(self.method):
            return Found("it cannot be merged", None, holds=False)
        tables = [one for one in evidence.merged if self.method in one.ratios]
        if not tables:
            return Found("no committed table times its merged inference")
        pairs = [(one.ratios[self.method], one.ratios["frozen"]) for one in tables]
        same = [merged[0] <= frozen[1] and frozen[0] <= merged[1] for merged, frozen in pairs]
        words = f"merged inference takes the frozen model's time in {sum(same)} of {len(same)} tables"
        return Found(words, None, all(same), tuple(dict.fromkeys(one.link for one in tables)))


Claim = Annotated[SuiteClaim | ExperimentClaim | MultiplierClaim | CountClaim | MergeClaim, Field(discriminator="kind")]


@dataclass(frozen=True)
class Ruled:
    """A claim and what came of it.

    Attributes:
        claim: as published.
        found: what the records say.
        ruling: in one word or two.
    """

    claim: Claim
    found: Found
    ruling: Ruling


def read_claims() -> list[Claim]:
    """All entries of `claims.toml`."""
    return TypeAdapter(list[Claim]).validate_python(tomllib.loads(CLAIMS.read_text(encoding="utf-8"))["claim"])


def rule_on_claims(evidence: Evidence, claims: Sequence[Claim] | None = None) -> list[Ruled]:
    """Test every claim; p-values are adjusted by Holm over all claims that a test decides."""
    claims = read_claims() if claims is None else list(claims)
    found = [claim.test(evidence) for claim in claims]
    tested = [number for number, one in enumerate(found) if one.p is not None]
    adjusted = dict(
        zip(tested, multipletests([found[number].p for number in tested], method="holm")[1], strict=True)
        if tested
        else ()
    )
    return [
        Ruled(claim, one, _rule(one, adjusted.get(number)))
        for number, (claim, one) in enumerate(zip(claims, found, strict=True))
    ]


def _rule(found: Found, p: float | None) -> Ruling:
    if found.holds is None:
        return "undecided here" if found.evidence else "untested here"
    if p is not None and p >= LEVEL:
        return "undecided here"
    if p is None:
        return "reproduced" if found.holds else "not reproduced"
    return "reproduced" if found.holds else "refuted here"


def _by_seed(rows: pd.DataFrame, method: str, column: str) -> pd.Series:
    own = rows[rows["method"] == method]
    return own.set_index("seed")[column].astype(float)
