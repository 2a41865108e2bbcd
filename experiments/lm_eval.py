"""lm-evaluation-harness with kvtwin among its models: `python -m experiments.lm_eval`, then the harness's arguments.

The harness of 0.4.13 knows no models but its own. Later ones look for the entry point that pyproject.toml names, and
`lm_eval` itself then does the same.
"""

import sys
from importlib import import_module
from importlib.util import find_spec

from framework.errors import KvtwinError


def main() -> None:
    """Run the harness's command line. Bad input to kvtwin ends with its message and exit code 2."""
    if find_spec("lm_eval") is None:
        print(
            "kvtwin: lm-evaluation-harness is not installed; run pip install 'kvtwin[lm-eval]'",
            file=sys.stderr,
        )
        sys.exit(2)
    import_module("lm_eval.models")  # registers its own models, which it does only where there are none yet
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    from experiments.harness.model import Kvtwin

    register_model("kvtwin")(Kvtwin)
    try:
        cli_evaluate()
    except KvtwinError as error:
        print(f"kvtwin: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
