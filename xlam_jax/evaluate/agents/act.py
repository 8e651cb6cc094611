"""Act (the baseline of ReAct, arXiv 2210.03629): acts after an example, without thoughts."""

from xlam_jax.evaluate.agents._text import TextAgent


class Act(TextAgent):
    about = "acts after an example, without thoughts (arXiv 2210.03629)"
    format = "Answer with one line and nothing else:\nAction: name[argument]"
