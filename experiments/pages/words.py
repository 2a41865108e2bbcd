"""The captions of the page, as HTML: what a plot shows, what its intervals are, and what a reader must not conclude."""

from experiments.pages.palette import FLAG_NOTE

INTERVAL = """Intervals are 95%, of the mean over the seeds of a cell, by the bootstrap (percentiles of 2000
resamples)."""
QUALITY = f"""Left against the kept share of the context that was achieved, right against all bytes that the cache
allocated for a sequence, each a mean over the seeds. {INTERVAL} They are the vertical lines. The dashed line is full().
A second backend is dotted. {FLAG_NOTE} Oracles, where they ran, are grey: they see the future. A click on a policy in
the legend hides it."""
DIFFERENCES = """Mean of the row's policy less the column's, seed by seed on the same prompts under the same budget
({seeds}); policies without a budget stand in each. Below it the 95% interval of that mean, by the bootstrap; bold where
it excludes 0. Blue: the row is better; orange: the column is; scaled to the largest difference shown. The intervals are
not corrected for the number of comparisons."""
BYTES = f"""Every policy (colour) under every codec (marker), against all bytes allocated for a sequence (left) and
against those of the kept keys and values alone (right). The black line is the Pareto front: no cell takes as little and
is better. Oracles are never on it, masked cells not on the right one. {INTERVAL} {FLAG_NOTE}"""
CELLS = """A click on a column sorts by it. low and high bound the 95% interval of the mean over the seeds, by the
bootstrap; tokens are per kv head and bytes per sequence, means over the seeds. A flag stands with the number of seeds
that have it."""
REGRET = f"""mass: the share of later attention that goes to kept tokens; future and step: what two oracles have with as
many tokens, without and with a way back; regret: future less mass, below 0 where a policy does better than the greedy
oracle. {INTERVAL} {FLAG_NOTE}"""
BACKENDS = """The same cell on two backends, seed by seed: the share of seeds that kept the same number of tokens
(fewest, most and mean of a head) and wrote the same text, and the largest difference of the main measure."""
MAP = """One run again, on torch, when this page was made: the prompt, then the question and the right answer (or the
next text) one token a call. Rows are the kv heads of all layers, columns the tokens.
<span style="color:#0072b2">Blue</span> is held, <span style="color:#d55e00">orange</span> goes at this call, grey went
before (at 0: what the end of the prompt left out), white has not come yet; triangles mark the answer in the context.
Hover for a token's text, and when and why it goes. After the prompt a head holds {least} to {most} of {prompt} tokens;
{evicted} evictions in all. No interval: it is one run."""
PANEL = "{measure}; {seeds}; whiskers: 95% interval of the mean."


def caption(text: str) -> str:
    """A paragraph below a heading."""
    return f'<p class="caption">{text}</p>'
