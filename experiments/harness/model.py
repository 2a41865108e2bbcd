"""kvtwin as a model of lm-evaluation-harness: what it asks is answered from caches under a policy and a codec.

Contexts hold the question, so that what is measured is compression that knows it. How requests are read is said in
continuations.py (`loglikelihood`, `loglikelihood_rolling`) and until.py (`generate_until`).
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from experiments.harness.arguments import arguments, fitted, writing
from experiments.harness.continuations import Setting, followed, scored
from experiments.harness.until import written
from experiments.question import Held
from experiments.record import versions
from framework.codec import codecs
from framework.errors import KvtwinError
from framework.eviction import resolved
from framework.policy import policies

try:
    from lm_eval.api.model import TemplateLM
except ModuleNotFoundError:  # without the harness this file can be imported, and nothing makes a model of it
    TemplateLM = object

LOG = logging.getLogger("lm_eval.kvtwin")
Found = TypeVar("Found")


class Kvtwin(TemplateLM):
    """A model that the harness asks; it is made with the fields of `experiments.harness.arguments.Arguments`."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        from backends import backends

        asked = self.arguments = arguments(given)
        model = backends.get(asked.backend).load(asked.path, dtype=asked.dtype)
        policy = policies.make(asked.policy)
        model.cache(resolved(policy, model.spec.positions), asked.codec)  # refuses what does not fit, at once
        spelled = policies.spelling(policy), codecs.spelling(codecs.make(asked.codec))
        self.setting = Setting(model, *spelled, asked.batch_size)
        self.held: list[Held] = []
        self.dropped = 0

    @property
    def max_length(self) -> int:
        """Tokens that one request may have."""
        return self.arguments.max_length or self.setting.model.spec.positions

    @property
    def eot_token_id(self) -> int | None:
        """The first token that ends a text, if there is any."""
        return next(iter(self.setting.model.spec.stop), None)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is read as, as the harness's `hf` has it."""
        own = self.arguments.prefix_token_id, self.setting.model.tokenizer.opening, self.eot_token_id
        found = next((token for token in own if token is not None), None)
        if found is None:
            raise KvtwinError(
                f"a context is empty, and {self.arguments.path} has no token that opens or ends a text; "
                "expected prefix_token_id=NUMBER in --model_args"
            )
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the opening token as `add_bos_token` says, and once where the text has it already."""
        wanted = self.arguments.add_bos_token if add_special_tokens is None else add_special_tokens
        tokenizer = self.setting.model.tokenizer
        ids, opening = tokenizer.encode(string, opening=wanted is not False), tokenizer.opening
        if opening is None or wanted is False:
            return ids
        if ids[:2] == [opening, opening]:
            return ids[1:]
        return [opening, *ids] if wanted and ids[:1] != [opening] else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation and whether greedy choice writes it."""
        pairs = [(self._fitted(context, after), after) for _, context, after in requests]
        answers: dict[int, tuple[float, bool]] = {}
        coming = scored(self.setting, pairs)
        for number, score in self._told("loglikelihood", coming, len(pairs), disable_tqdm):
            answers[number] = score.nats, score.greedy
            self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        return [answers[number] for number in range(len(pairs))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in the harness's windows of at most `max_length` tokens."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, owners = [], []
        for number, request in enumerate(requests):
            prefix, tokens = self.prefix_token_id, self.tok_encode(request.args[0])
            if tokens[:1] == [prefix]:  # the window has it
                tokens = tokens[1:]
            windows = get_rolling_token_windows(tokens, prefix, self.max_length, context_len=1)
            for context, after in map(make_disjoint_window, windows):
                pairs.append((context, after))
                owners.append(number)
        nats, left = np.zeros(len(requests)), Counter(owners)
        coming = followed(self.setting, pairs, self.arguments.chunk)
        for place, score in self._told("loglikelihood_rolling", coming, len(pairs), disable_tqdm):
            number = owners[place]
            nats[number] += score.nats
            left[number] -= 1
            if not left[number]:
                self.cache_hook.add_partial(
                    "loglikelihood_rolling", requests[number].args, float(nats[number])
                )
        return [float(each) for each in nats]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written behind each context, up to a stop string."""
        texts: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for numbers in alike.values():
            how = writing(requests[numbers[0]].args[1], self.arguments.seed)
            if how.room >= self.max_length:
                raise KvtwinError(
                    f"{how.room} tokens are to be written, and a request may have {self.max_length}; "
                    "expected fewer, or a larger max_length"
                )
            contexts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            read = [
                self._fitted(each or [self.prefix_token_id], [], self.max_length - how.room - 1)
                for each in contexts
            ]
            coming = written(self.setting, read, how.stops, how.room, how.sampling)
            for place, text in self._told("generate_until", coming, len(read), disable_tqdm):
                texts[numbers[place]] = text
                self.cache_hook.add_partial("generate_until", requests[numbers[place]].args, text)
        return [texts[number] for number in range(len(requests))]

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        """Refused."""
        raise KvtwinError(
            "kvtwin does not make texts of chats for the harness; leave --apply_chat_template out"
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: settings in one spelling, and what the caches held."""
        setting, asked = self.setting, self.arguments
        return {
            "kvtwin": {
                "path": asked.path,
                "policy": setting.policy,
                "codec": setting.codec,
                "backend": asked.backend,
                "dtype": asked.dtype,
                "chunk": asked.chunk,
                "dropped": self.dropped,
                "held": summary(self.held),
                "versions": versions(),
            }
        }

    def _fitted(self, context: list[int], after: list[int], most: int | None = None) -> list[int]:
        """The context, cut from the left where it does not fit; what was cut is told."""
        read, over = fitted(context, after, self.max_length if most is None else most)
        if over:
            self.dropped += over
            LOG.warning(
                "a request has %d tokens, and %d fit: the first %d of its context are left out",
                len(context) + len(after), len(context) + len(after) - over, over,
            )  # fmt: skip
        return read

    def _told(
        self, kind: str, coming: Iterator[tuple[int, Found, Held | None]], total: int, quiet: bool
    ) -> Iterator[tuple[int, Found]]:
        """What comes, with a progress bar; at the end what the caches held is told."""
        from tqdm import tqdm

        before = len(self.held)
        for number, each, held in tqdm(coming, f"kvtwin {kind}", total, disable=quiet):
            self.held += [] if held is None else [held]
            yield number, each
        LOG.info(
            "%s under %s and %s: %s",
            kind,
            self.setting.policy,
            self.setting.codec,
            summary(self.held[before:]),
        )


def summary(held: Sequence[Held]) -> dict[str, Any]:
    """What caches held: how many contexts, their tokens, tokens per kv head asked for and kept, bytes, and how many
    caches have which flag."""
    if not held:
        return {"contexts": 0}
    asked = [one.requested for one in held if one.requested is not None]
    return {
        "contexts": len(held),
        "tokens": [min(one.context for one in held), max(one.context for one in held)],
        "requested": float(np.mean(asked)) if asked else None,
        "kept": [
            min(one.kept_min for one in held),
            float(np.mean([one.kept for one in held])),
            max(one.kept_max for one in held),
        ],
        "payload": sum(one.payload for one in held),
        "allocated": sum(one.allocated for one in held),
        "full": sum(one.full for one in held),
        "flags": dict(Counter(flag for one in held for flag in one.flags)),
    }
