"""Fields of policies that have no meaning are refused."""

import pytest

from framework.errors import KvtwinError
from framework.policy import policies


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("lagkv(lag=1)", "lagkv has sinks=4, lag=1; expected sinks >= 0, lag >= 2"),
        ("lagkv(sinks=-1)", "lagkv has sinks=-1, lag=128"),
        ("noncausal_attention(chunk=0)", "noncausal_attention has chunk=0; expected at least 1"),
        (
            "compactor(recent=-1)",
            "compactor has sinks=8, recent=-1, chunk=256, sketch=48; expected sinks and",
        ),
        ("compactor(sketch=0)", "chunk and sketch >= 1"),
        ("cur(kernel=0)", "cur has sinks=4, kernel=0, kind='product'; expected sinks >= 0, kernel >= 1"),
        ("scissorhands(window=0)", "scissorhands has recent=10, window=0; expected recent >= 0, window >= 1"),
        ("rkv(kernel=4)", "rkv has window=8, kernel=4, beta=0.07; expected window >= 1, an odd kernel"),
        ("rkv(beta=1.5)", "beta from 0 to 1"),
        (
            "sink_recent(streaming=((0, 2),), policy=keydiff())",
            "sink_recent has sinks=128, recent=256, streaming=((0, 2),); expected sinks >= 0",
        ),
        (
            "fastgen(heavy=1.5)",
            "fastgen has heavy=1.5, local=0.3, recovery=0.95; expected shares from 0 to 1",
        ),
        ("simlayer(recent=0)", "simlayer has sinks=4, recent=0, threshold=0.9; expected sinks >= 0"),
        ("cap(future=0)", "cap has sinks=4, future=0, tau=5; expected sinks >= 0, future >= 1, tau >= 0"),
    ],
)
def test_fields_without_a_meaning_are_refused(spelling, words):
    with pytest.raises(KvtwinError) as error:
        policies.make(spelling)
    assert words in str(error.value)
