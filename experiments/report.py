"""What rows look like to a reader: tables for a terminal of 100 columns, and one plot of quality against bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.record import Row, whole

if TYPE_CHECKING:
    from rich.table import Table

Pair = tuple[Row, Row]

WIDTH = 100  # columns, where the output is no terminal


def pairs(rows: Sequence[Row]) -> dict[str, list[Pair]]:
    """The rows of each model, torch and flax of one policy side by side."""
    found: dict[str, list[Pair]] = {}
    flax = {(row.model, row.policy): row for row in rows if row.backend == "flax"}
    for row in rows:
        if row.backend == "torch":
            found.setdefault(row.model, []).append((row, flax[row.model, row.policy]))
    return found


def kib(count: int, row: Row) -> str:
    """Bytes of the batch as KiB per prompt."""
    return f"{count / 1024 / len(row.prompts):.0f}"


def both(first: str, second: str) -> str:
    """One value where the backends agree as printed, else both."""
    return first if first == second else f"{first}|{second}"


def kept(row: Row) -> str:
    """Fewest and most tokens of a head."""
    return f"{row.kept_min}" if row.kept_min == row.kept_max else f"{row.kept_min}-{row.kept_max}"


def tables(rows: Sequence[Row]) -> list["Table"]:
    """One table a model; a cell with two numbers is torch | flax."""
    return [_table(model, each) for model, each in pairs(rows).items()]


def _table(model: str, each: list[Pair]) -> "Table":
    from rich import box
    from rich.table import Table

    first = each[0][0]
    recalls = first.recall is not None
    lengths = f"{min(first.prompts)} to {max(first.prompts)}"
    asked = "one question each" if recalls else f"{first.steps} given tokens each"
    table = Table(
        title=f"{model}: {len(first.prompts)} prompts of {lengths} bytes, {asked}; KiB per prompt; torch|flax",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("policy", no_wrap=True)
    columns = ["kept", "held", "allocated", "KL"]
    columns += ["recall", "formula"] if recalls else ["top-1", "tokens/s"]
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("torch == flax", no_wrap=True)
    for torch, flax in each:
        cells = [
            both(kept(torch), kept(flax)),
            both(kib(torch.payload_bytes, torch), kib(flax.payload_bytes, flax)),
            both(kib(torch.allocated_bytes, torch), kib(flax.allocated_bytes, flax)),
            both(f"{torch.kl:.2g}", f"{flax.kl:.2g}"),
        ]
        if recalls:
            cells += [both(share(torch.recall), share(flax.recall))]
            cells += [both(share(torch.as_predicted), share(flax.as_predicted))]
        else:
            cells += [both(share(torch.top1), share(flax.top1)), both(rate(torch), rate(flax))]
        flags = "".join(f", {flag}" for flag in sorted({*torch.flags, *flax.flags}))
        style = "red" if not torch.equal else "yellow" if flags else ""
        verdict = "NO" if not torch.equal else torch.verdict
        table.add_row(torch.policy, *cells, verdict + flags, style=style)
    return table


def share(value: float | None) -> str:
    """A share of 1."""
    return "-" if value is None else f"{value:.2f}"


def rate(row: Row) -> str:
    """Tokens a second."""
    return "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """KL against bytes for text, recall against bytes for recall prompts; filled is torch, the ring is flax."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    found = pairs(rows)
    names = sorted({row.policy.partition("(")[0] for row in rows if row.requested_tokens is not None})
    figure, axes = pyplot.subplots(1, max(len(found), 1), figsize=(9.2, 4.3), squeeze=False)
    colours = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))
    for axis, (model, each) in zip(axes[0], found.items(), strict=True):
        _panel(axis, model, each, colours)
    handles = [Line2D([], [], color=colours[name], marker="o", label=name) for name in names]
    handles += [
        Line2D([], [], color="black", marker="*", linestyle="", markersize=10, label="full"),
        Line2D([], [], color="grey", marker="o", linestyle="", label="torch"),
        Line2D([], [], color="grey", marker="o", linestyle="", markersize=9, fillstyle="none", label="flax"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def _panel(axis, model: str, each: list[Pair], colours: dict) -> None:
    recalls = each[0][0].recall is not None
    lines: dict[str, list[Pair]] = {}
    for pair in each:
        lines.setdefault(pair[0].policy.partition("(")[0], []).append(pair)

    def point(row: Row) -> tuple[float, float]:
        quality = row.recall if recalls else row.kl
        return row.allocated_bytes / len(row.prompts) / 1024, quality or 0.0

    for name, points in lines.items():
        budgeted = [pair for pair in points if pair[0].requested_tokens is not None]
        style = "--" if list(lines).index(name) % 2 else "-"  # two policies may lie on one line
        torch = [point(pair[0]) for pair in budgeted]
        flax = [point(pair[1]) for pair in budgeted]
        if budgeted:
            axis.plot(*zip(*torch, strict=True), color=colours[name], marker="o", markersize=5, ls=style)
            axis.plot(
                *zip(*flax, strict=True),
                color=colours[name],
                marker="o",
                markersize=9,
                fillstyle="none",
                ls="",
            )
    full = point(each[0][0])[0]
    if recalls:
        axis.plot([full], [each[0][0].recall], color="black", marker="*", markersize=12, ls="")
        axis.set_ylim(-0.04, 1.06)
        axis.set_ylabel("planted values recalled")
    else:
        axis.set_yscale("log")
        axis.axvline(full, color="black", lw=1, ls=":")
        axis.annotate("full: KL 0 ", (full, 0.5), xycoords=("data", "axes fraction"), ha="right", fontsize=9)
        axis.set_ylabel("KL from the full cache, nats per token")
    axis.set_title(f"{model}: {'recall prompts' if recalls else 'held-out text'}", fontsize=11)
    axis.set_xlabel("KiB allocated per sequence")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
