"""Random configurations of the relatives."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

TASKS = 4
counts = st.integers(1, 5)

RELATIVES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "moslora": st.fixed_dictionaries({"rank": counts, "mixer": st.sampled_from(["kaiming", "orthogonal"])}),
    "hydralora": st.fixed_dictionaries({"rank": counts, "num_experts": counts}),
    "mtl-lora": st.fixed_dictionaries(
        {"rank": counts, "num_experts": counts, "temperature": st.floats(0.1, 1.0), "num_tasks": st.just(TASKS)}
    ),
    "lora-per-task": st.fixed_dictionaries({"rank": counts, "num_tasks": st.just(TASKS)}),
    "mola": st.fixed_dictionaries(
        {
            "rank": counts,
            "allocation": st.lists(st.integers(2, 4), min_size=1, max_size=3).map(tuple),
            "top_k": st.integers(1, 2),
            "tokens": st.sampled_from(["real", "all"]),
        }
    ),
    "loramoe": st.fixed_dictionaries(
        {
            "rank": counts,
            "num_experts": st.integers(2, 5),
            "types": st.sampled_from([(), (0, 0, 1, 1), (0, 1, 0, 0)]),
            "delta": st.sampled_from([0.0, 0.3]),
            "dispersion": st.sampled_from(["mean", "squared_mean"]),
            "tokens": st.sampled_from(["real", "all"]),
        }
    ),
}
