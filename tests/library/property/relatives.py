"""Random configurations of the relatives."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

counts = st.integers(1, 5)

RELATIVES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "moslora": st.fixed_dictionaries({"rank": counts, "mixer": st.sampled_from(["kaiming", "orthogonal"])}),
    "hydralora": st.fixed_dictionaries({"rank": counts, "num_experts": counts}),
}
