"""Rebuild docs/architectures.md: all of it, or the architectures and methods that are named.

python -m tests.library.architectures
python -m tests.library.architectures --methods flylora
python -m tests.library.architectures bert mamba
"""

from __future__ import annotations

import argparse

import moepeft

from . import table


def main() -> None:
    """Run what is named; the page keeps the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE", help="all unless named")
    parser.add_argument("--methods", nargs="+", default=[], help="all unless named")
    options = parser.parse_args()
    whole = not (options.names or options.methods)
    known = {} if whole else table.read(table.PAGE.read_text())
    for name, row in table.compute(options.names or list(table.HOSTS), options.methods or None):
        before = known[name].outcomes if name in known else {}
        known[name] = table.Row(row.clauses, {**before, **row.outcomes})
        for method, text in row.outcomes.items():
            if text != table.OK:
                print(f"{name} ({row.clauses}), {method}: {text}", flush=True)
    methods = moepeft.available()
    rows = {
        name: table.Row(known[name].clauses, {method: known[name].outcomes[method] for method in methods})
        for name in table.HOSTS
    }
    table.PAGE.write_text(table.page(rows))
    print(table.counted(rows))


if __name__ == "__main__":
    main()
