"""`kvtwin policies`: every bundled policy in one table, read off the policies themselves. The README's is this one."""

import inspect
import sys
from dataclasses import dataclass, fields
from typing import Annotated

import typer

from framework.policy import Policy, policies
from framework.wrapper import Wrapper, rereads

HEAD = ("policy", "keeps", "source", "kept set", "needs", "notes")


@dataclass(frozen=True)
class Entry:
    """One row of the table, as text."""

    name: str
    keeps: str
    source: str
    sets: str
    needs: str
    notes: str

    @property
    def cells(self) -> tuple[str, ...]:
        """In the order of the columns."""
        return (f"`{self.name}`", self.keeps, self.source, self.sets, self.needs, self.notes)


def entries() -> list[Entry]:
    """One entry per bundled policy, by name; what a wrapper shows is its own example's."""
    return [entry(name) for name in policies.names()]


def entry(name: str) -> Entry:
    """What the class called `name` says of itself."""
    kind = policies.get(name)
    one = kind.examples()[0]
    doc = inspect.getdoc(sys.modules[kind.__module__]) or ""
    paper = doc.partition("arXiv ")[2][:10].rstrip(")").rstrip(":;,. )")
    needs = [each.name for each in fields(one.needs) if getattr(one.needs, each.name)]
    notes = {
        "wrapper": isinstance(one, Wrapper),
        "memory": bool(one.memory),
        "overwrites": one.order_free and one.evicts,
        "merges": one.merges,
        "repositions": one.repositions,
        "second pass": rereads(one) and not isinstance(one, Wrapper),
    }
    keeps = (inspect.getdoc(kind) or "").splitlines()[0].rstrip(".")
    return Entry(
        name, keeps, paper, _sets(one), ", ".join(needs), ", ".join(key for key in notes if notes[key])
    )


def _sets(one: Policy) -> str:
    if not one.evicts:
        return "all"
    if one.allocates:
        return "budget per layer"
    return "budget per head" if one.divides else "one for all heads" if one.shared else "per head"


def markdown() -> str:
    """The table in Markdown."""
    rows = [HEAD, ("---",) * len(HEAD), *(each.cells for each in entries())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def command(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print it as the README has it.")] = False,
) -> None:
    """List the bundled policies: what each keeps, what it needs of the model, and whose budget it divides."""
    if as_markdown:
        typer.echo(markdown())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEAD, show_lines=False)
    for each in entries():
        table.add_row(*(cell.strip("`") for cell in each.cells))
    Console(highlight=False).print(table)
    typer.echo("Every policy runs at prefill and at decode, on torch and flax, on ragged batches.")
