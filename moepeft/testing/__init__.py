"""Check a method of one's own: `check_method` holds it to the contract that this library's methods are held to.

    from moepeft.testing import check_method
    check_method(MyMethod(rank=4))

The check needs torch alone. It raises `moepeft.errors.ContractError` with one line: on which model, which clause
failed, and what to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

from moepeft.attach import attach
from moepeft.config import with_tasks
from moepeft.errors import ContractError, Unsupported
from moepeft.protocols import AdapterFactory, FactoryClass
from moepeft.registry import registered

from .clauses import CLAUSES, Clause, count_is_the_closed_form
from .hosts import HOSTS, ROWS, Host

__all__ = ["CLAUSES", "HOSTS", "Clause", "Host", "check_clause", "check_method"]


def check_method(factory: AdapterFactory, hosts: Sequence[Host] = HOSTS) -> None:
    """Hold a configured method to every clause of the contract on every host that it can adapt.

    The method need not be registered. A method that knows tasks is configured for four of them. A host that the method
    refuses, by `moepeft.errors.Unsupported`, is left out with a warning.

    Args:
        factory: the method's configuration.
        hosts: the models; by default an encoder, one with gated feed-forward networks, and one without positions.

    Raises:
        ContractError: a clause does not hold, or the method refuses every host.
    """
    factory = with_tasks(factory, ROWS)
    # A layout whose rows are not the first dimension has no batch of mixed rows on these hosts.
    clauses = CLAUSES if factory.capabilities.batch_first else (count_is_the_closed_form,)
    with registered(cast(FactoryClass, type(factory))):
        refusals = {host.name: _refusal(factory, host) for host in hosts}
        if all(refusals.values()):
            raise ContractError(f"{factory.name} refuses every host, so nothing was checked: {refusals}")
        for host in hosts:
            if refusals[host.name] is not None:
                warnings.warn(f"{factory.name} was not checked on {host.name}: {refusals[host.name]}", stacklevel=2)
                continue
            for clause in clauses:
                check_clause(clause, factory, host)


def _refusal(factory: AdapterFactory, host: Host) -> str | None:
    """Why the method adapts no layer of the host; None if it adapts some, or fails in another way."""
    try:
        attach(host.build(), factory)
    except Unsupported as error:
        return str(error)
    except Exception:  # the clauses say which of them it breaks
        return None
    return None


def check_clause(clause: Clause, factory: AdapterFactory, host: Host) -> None:
    """One clause on one host.

    Raises:
        ContractError: it does not hold, or the method raised an error of its own.
    """
    where = f"{factory.name} on {host.name}: {clause.__name__.replace('_', ' ')}"
    try:
        clause(factory, host)
    except ContractError as error:
        raise ContractError(f"{where}: {error}") from None
    except Exception as error:
        said = " ".join(str(error).split())
        raise ContractError(f"{where}: raised {type(error).__name__}: {said[:400]}") from error
