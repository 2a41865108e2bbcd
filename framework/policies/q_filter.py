"""Q-filter: tokens whose keys lie along the direction that queries share (arXiv 2503.02812).

The filter of a kv head is the first right singular vector of its queries on calibration text, signed so that queries
point along it on the average; the score of a token is the product of its key and the filter. `kvtwin filters` computes
the filters of a model and writes them to a file, `q_filter(path="bytes.filters", digest="...")`. The digest is
optional; given, another file is refused. `path="random:0"` is the control: random directions.

Deviations: queries and keys enter as the model uses them, rotated; a group's queries are taken together. Other code
scores by minus the product with published filters, whose sign is not told; here the sign is the definition's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from framework.arrays import Array
from framework.calibration import RANDOM, check_arrays, random_arrays, read_arrays
from framework.errors import KvtwinError
from framework.policy import Needs, Policy, View
from framework.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class QFilter(Policy):
    """Keeps what the shared direction of queries points at."""

    path: str = ""
    digest: str = ""

    needs: ClassVar[Needs] = Needs(keys=True)
    order_free: ClassVar[bool] = True

    def constants(self, spec: ModelSpec) -> Mapping[str, np.ndarray]:
        shapes = {
            f"layers.{index}": (layer.kv_heads, layer.head_dim) for index, layer in enumerate(spec.layers)
        }
        if self.path.startswith(RANDOM):
            return random_arrays(self.path, shapes)
        if not self.path:
            raise KvtwinError(
                "q_filter has no path; expected the file that `kvtwin filters MODEL TEXT --out FILE` writes"
            )
        return check_arrays(self.path, read_arrays(self.path, self.digest, "filters", spec), shapes)

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        direction = view.constants[f"layers.{view.layer}"]
        return view.xp.sum(view.keys * direction[None, :, None, :], axis=-1)

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls(budget=9, path="random:0"), cls(budget=7, path="random:3", interval=3)]
