"""What `kvtwin bench` found, to look at: tables for a terminal of 100 columns and for the README, and two plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.benches.case import FULL, NONE, Case
from experiments.benches.result import Result, Spread
from experiments.benches.row import Row
from experiments.benches.target import Finding, findings
from experiments.record import whole

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 100  # columns, where the output is no terminal
COLUMNS = ("what", "engine", "time", "tokens/s", "speed", "of rounds", "over", "limit", "compile")
BUSY = 0.2  # cores busy with something else that are worth a note
LEFT = ("what", "engine", "over")
COLOURS = {
    "torch": "tab:orange",
    "flax": "tab:blue",
    "hf-dynamic": "black",
    "hf-static": "tab:gray",
    "hf-compile": "tab:brown",
    "kvpress": "tab:green",
}
LABELS = {"torch": "kvtwin torch", "flax": "kvtwin flax", "hf-dynamic": "Hugging Face, dynamic cache"}
LABELS |= {"hf-static": "Hugging Face, static cache", "hf-compile": "Hugging Face, static, torch.compile"}


def machine_line(rows: Sequence[Row]) -> str:
    """What the rows were measured on, and the bandwidth that it read."""
    machine = rows[-1].machine
    readings = sorted(each for row in rows if row.bandwidth for each in row.bandwidth)
    read = f", {readings[len(readings) // 2] / 1e9:.1f} GB/s read" if readings else ""
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    dtypes = " and ".join(dict.fromkeys(row.case.dtype for row in rows))
    return f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['memory']} GiB{read}; {dtypes}"


def versions_line(rows: Sequence[Row]) -> str:
    """What the engines ran on."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for package, version in row.versions.items():
            if package != "kvtwin":
                found.setdefault(package, {})[version] = None
    return ", ".join(f"{package} {' and '.join(each)}" for package, each in sorted(found.items()))


def table(results: Sequence[Result]) -> "Table":
    """All results, group by group."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        made.add_column(
            column, justify="left" if column in LEFT else "right", no_wrap=column != "what", overflow="fold"
        )
    before = None
    for result in results:
        if before is not None and before.group != result.group:
            made.add_section()
        shown = cells(result)
        if before is not None and (before.group, before.case) == (result.group, result.case):
            shown[0] = ""
        made.add_row(*shown, style="red" if result.error else "")
        before = result
    return made


def cells(result: Result) -> list[str]:
    """A row of the table. `speed`: how many times as fast as `over`, the median of the rounds."""
    speed, rate = result.speed, result.tokens_per_second
    return [
        what(result.case),
        result.engine,
        "failed" if result.seconds is None else duration(result.seconds.median),
        "" if rate is None else digits(rate),
        "" if speed is None else f"{speed.median:.2f}",
        "" if speed is None else f"{speed.least:.2f}-{speed.most:.2f}",
        other(result),
        "" if result.limit is None else f"{result.limit.median:.2f}",
        "" if result.compiled is None or result.compiled < 0.5 else f"{result.compiled:.1f} s",
    ]


def what(case: Case) -> str:
    """A case without its model, which a table names once."""
    return str(case).replace(f" {case.model}", "")


def other(result: Result) -> str:
    """What a result is compared with: its engine, or the context where that is the difference."""
    engine, _, case = (result.over or "").partition(": ")
    return f"at {case.split()[2]}" if engine == result.engine else engine


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader has to know beside the table."""
    return [f"{each.engine}, {what(each.case)}: {text}" for each in results if (text := note(each))]


def note(result: Result) -> str:
    """What a reader has to know of the numbers."""
    words = []
    if result.moved:
        words.append(
            f"the bandwidth moved in {result.moved} of {result.rounds} rounds, every time they were tried"
        )
    if result.others is not None and result.others >= BUSY:
        words.append(f"other processes kept {result.others:.1f} cores busy")
    if result.memory is not None and result.over and result.over.startswith(f"{result.engine}: "):
        words.append(f"{result.memory:.2f} of the memory {other(result)}")
    if "load" in result.parts:
        parts = result.parts
        words.append(
            f"imports {parts['imports']:.1f}, loading {parts['load']:.1f}, first {parts['first']:.1f} s"
        )
        if {"peak", "weights"} <= set(parts):
            words.append(f"peak {parts['peak'] / 2**30:.2f} of {parts['weights'] / 2**30:.2f} GiB weights")
    if result.error:
        words.append(f"failed: {result.error}")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """Seconds, or milliseconds where there is less than one."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def digits(value: float) -> str:
    """Three digits, as they are written."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(value: Spread, unit: str = "") -> str:
    """A median with the least and the most of all rounds, where they differ."""
    if f"{value.least:.2f}" == f"{value.most:.2f}":
        return f"{value.median:.2f}{unit}"
    return f"{value.median:.2f}{unit} ({value.least:.2f}-{value.most:.2f})"


def by_model(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each model; those without one stand with the last."""
    names = list(dict.fromkeys(each.case.model for each in results if each.case.model != NONE)) or [NONE]
    last = names[-1]
    return {
        name: [each for each in results if each.case.model in ((name, NONE) if name == last else (name,))]
        for name in names
    }


def markdown(results: Sequence[Result], rows: Sequence[Row], command: str | None) -> str:
    """Both tables for the README: what became of the targets, and all results. `command`: what measured them."""
    told = findings(results)
    told_by = "" if command is None else f"`{command}`: "
    lines = [f"{told_by}{machine_line(rows)}; {versions_line(rows)}.", ""]
    if told:
        lines += _markdown(
            ("what", "engine", "target", "median (least-most)", ""), [_finding(each) for each in told]
        )
        lines += [""]
    for model, some in by_model(results).items():
        lines += [f"{model}:", "", *_markdown(COLUMNS, [cells(each) for each in some])]
        lines += ["", *(f"- {each}" for each in notes(some)), ""]
    return "\n".join(lines)


def _finding(finding: Finding) -> list[str]:
    target, case = finding.target, finding.result.case
    value = "failed" if finding.value is None else spread(finding.value)
    cases = sum(target.of(each) for each in _SEVERAL)
    which = f"{target.what}: {_which(case)}" if cases > 1 else target.what
    return [which, finding.result.engine, target.shown, value, "met" if finding.met else "**missed**"]


# Cases of which a target takes more than one.
_SEVERAL = (
    *(Case("decode", "", context) for context in (128, 2048)),
    *(Case("prefill", "", context) for context in (512, 2048)),
    *(Case("prefill", "", 2048, policy=policy) for policy in ("a", "b")),
)


def _which(case: Case) -> str:
    return case.policy.partition("(")[0] if case.policy != FULL else str(case.context)


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(each.replace("|", "\\|") for each in row) + " |" for row in rows]


def plot(results: Sequence[Result], path: Path, kind: str, machine: str) -> bool:
    """Decode or prefill by context, one line an engine and one panel a model; False where there are no two contexts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = [
        each for each in results
        if (each.case.kind, each.case.batch, each.case.policy, each.case.codec) == (kind, 1, FULL, FULL)
        and each.tokens_per_second
    ]  # fmt: skip
    if len({each.case.context for each in plain}) < 2:
        return False
    models = list(dict.fromkeys(each.case.model for each in plain))
    figure, axes = pyplot.subplots(1, len(models), figsize=(1.6 + 5.6 * len(models), 4.8), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        _panel(axis, [each for each in plain if each.case.model == model], kind)
        axis.set_title(f"{model}, {kind}, batch 1", fontsize=11, loc="left")
    handles = {
        label: each for axis in axes[0] for each, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    columns = 2 * len(models)
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", bbox_to_anchor=(0.5, 0.04), ncols=columns,
        frameon=False, fontsize=9,
    )  # fmt: skip
    foot = f"{machine}; medians, with the least and the most of all rounds"
    figure.text(0.01, 0.012, foot, fontsize=7.5, color="dimgray")
    figure.tight_layout(rect=(0, 0.06 + 0.045 * -(-len(handles) // columns), 1, 1))
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
    return True


def _panel(axis: Any, results: Sequence[Result], kind: str) -> None:
    contexts = sorted({each.case.context for each in results})
    for engine in dict.fromkeys(each.engine for each in results):
        # One group has it, or the last that has.
        own = {each.case.context: each for each in results if each.engine == engine and each.seconds}
        xs = sorted(own)
        found = [own[x] for x in xs]
        rates = [each.tokens_per_second or 0.0 for each in found]
        ends = [
            (each.case.tokens / s.most, each.case.tokens / s.least) for each in found if (s := each.seconds)
        ]
        errors = [[rate - low for rate, (low, _) in zip(rates, ends, strict=True)],
                  [high - rate for rate, (_, high) in zip(rates, ends, strict=True)]]  # fmt: skip
        label = LABELS.get(engine, engine)
        axis.errorbar(xs, rates, yerr=errors, color=COLOURS.get(engine), marker="o", capsize=3, label=label)
    if kind == "decode":
        _limit(axis, results)
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{each:,}" for each in contexts])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens in the cache" if kind == "decode" else "tokens of the prompt")
    axis.set_ylabel("tokens per second")
    axis.grid(alpha=0.3)


def _limit(axis: Any, results: Sequence[Result]) -> None:
    """What the bandwidth allows, from the share of it that each result reaches."""
    allowed: dict[int, list[float]] = {}
    for each in results:
        if each.limit and each.tokens_per_second:
            allowed.setdefault(each.case.context, []).append(each.tokens_per_second / each.limit.median)
    xs = sorted(allowed)
    ys = [sorted(allowed[x])[len(allowed[x]) // 2] for x in xs]
    axis.plot(xs, ys, color="tab:red", linestyle=":", label="what the read bandwidth allows")
