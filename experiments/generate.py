"""`kvtwin generate`: continue a prompt under a policy and say what the cache held."""

from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A bundled name, a folder on disk, or org/name.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    question: Annotated[str | None, typer.Option(help="Behind the prompt, marked for the policy.")] = None,
    policy: Annotated[str, typer.Option(help='As in "h2o(budget=64)".')] = "full()",
    codec: Annotated[str, typer.Option(help='As in "exl2_q6()".')] = "full()",
    backend: Annotated[str, typer.Option(help="reference, torch or flax.")] = "torch",
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16, or float16 on torch.")] = "float32",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling noise.")] = 0,
) -> None:
    """Continue a prompt; the same text from every backend."""
    from backends import backends

    loaded = backends.get(backend).load(model, dtype="float64" if backend == "reference" else dtype)
    out = loaded.generate(
        prompt,
        question=question,
        policy=policy,
        codec=codec,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    typer.echo(prompt + (question or "") + out.text[0])
    kept = ", ".join(str(layer.shape[-1]) for layer in out.kept)
    typer.echo(
        f"\n{len(out.tokens[0])} tokens in {out.seconds:.2f} s; kept per layer: {kept} of {out.cache.seen[0]}; "
        f"{out.bytes.payload + out.bytes.scales} bytes of K and V, {out.bytes.capacity} allocated",
        err=True,
    )
