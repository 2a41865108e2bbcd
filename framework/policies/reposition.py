"""Reposition: positions are closed up, so that kept keys are rotated by their rank among the kept (arXiv 2309.17453).

Around any policy: `reposition(budget=512, policy=snapkv())`. What is kept is up to the inner policy, which sees keys
and queries as the model then uses them. The rotation is exact at every call: keys are cached without it. `window` has
this as a field of its own, since it belongs to that paper.

Deviation: Finch and others rotate once, when the prompt is compressed, and later tokens by their true positions or by
the new count; here ranks are counted anew after every eviction.
"""

from dataclasses import dataclass

from framework.policies.h2o import H2O
from framework.policies.snapkv import SnapKV
from framework.policy import Policy
from framework.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class Reposition(Wrapper):
    """Rotates keys by their rank in the cache."""

    repositions = True

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, policy=SnapKV(window=3, kernel=3)),
            cls(budget=8, policy=H2O(), interval=3),
        ]
