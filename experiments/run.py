"""The command line: `kvtwin COMMAND`, the same as `python -m experiments.run COMMAND`.

Bad input ends with its message on standard error and exit code 2, without a traceback.
"""

import sys

from experiments.installed import advice, missing

if absent := missing():
    print(f"kvtwin: {advice(absent)}", file=sys.stderr)
    sys.exit(2)

import typer

from experiments import (
    bench,
    catalogue,
    check,
    collapse,
    compare,
    demo,
    filters,
    formats,
    generate,
    history,
    memory,
    oracle,
    page,
    regret,
    sweep,
)
from framework.errors import KvtwinError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("demo")(demo.command)
app.command("bench")(bench.command)
app.command("generate")(generate.command)
app.command("compare")(compare.command)
app.command("check")(check.command)
app.command("policies")(catalogue.command)
app.command("codecs")(formats.command)
app.command("memory")(memory.command)
app.command("filters")(filters.command)
app.command("explain")(history.command)
app.command("regret")(regret.command)
app.command("oracle")(oracle.command)
app.command("collapse")(collapse.command)
app.command("run")(sweep.command)
app.command("report")(page.command)


@app.callback()
def about() -> None:
    """Key-value cache policies, written once and run in PyTorch and in compiled JAX."""


def main() -> None:
    """Run the command line."""
    try:
        app()
    except KvtwinError as error:
        print(f"kvtwin: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
