"""How much each layer's attention matters for the output: the model's own layers run backward, compiled."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from backends.flax.cache import State
from backends.flax.convert import widened
from backends.flax.decode import Skeleton, _attend, _coded, _embed, _inside, _places, _project, _rest, no_tap
from backends.flax.layer import Given, Plan, append, opened
from framework.arrays import Array
from framework.groups import Call


@partial(jax.jit, static_argnames=("bones", "plan"))
def gradients(
    bones: Skeleton,
    plan: Plan,
    leaves: list[jax.Array],
    given: Given,
    state: State,
    tokens: Int[Array, "batch tokens"],
) -> list[Float[jax.Array, "batch tokens dim"]]:
    """See `framework.backend.Model.gradients`. Zeros are added to what attention gives, and differentiated by."""
    decoder = bones.decoder(leaves)
    tokens, given = jnp.asarray(tokens), _inside(decoder, plan, given)
    real = tokens >= 0
    positions, seen = _places(state, real)
    start = _embed(decoder, plan, tokens, no_tap)

    def layer(index: int, x: jax.Array, added: jax.Array) -> jax.Array:
        block, before = decoder.layers[index], opened(state.layers[index])
        q, new, left, source = _project(block, plan, index, x, positions, given, no_tap)
        first = before.slots
        call = Call(left, positions, state.seen, seen)
        made, _ = _coded(plan, index, positions, new, left, state.unfit)
        held = append(before, made, positions, tokens, plan.policy)
        y, _, _ = _attend(
            block,
            plan,
            index,
            held,
            q,
            new,
            call,
            first,
            positions,
            source,
            given,
            no_tap,
            seen=seen,
            phase="pass",
        )
        return _rest(block, plan, index, x, y + added, no_tap)

    def total(added: list[jax.Array]) -> jax.Array:
        x = start
        for index, each in enumerate(added):
            # A layer is run again when its gradient is due: only its input is held until then.
            x = jax.checkpoint(partial(layer, index))(x, each)
        return jnp.sum(jnp.where(real[..., None], widened(x) ** 2, 0))

    return [widened(one) for one in jax.grad(total)([jnp.zeros_like(start) for _ in decoder.layers])]
