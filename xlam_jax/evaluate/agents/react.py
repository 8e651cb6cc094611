"""ReAct (arXiv 2210.03629): a thought before each action, after an example."""

from xlam_jax.evaluate.agents._text import TextAgent


class ReAct(TextAgent):
    about = "a thought before each action, after an example (arXiv 2210.03629)"
    format = (
        "Answer with two lines, a thought about what you know and need, and one action:\n"
        "Thought: …\nAction: name[argument]"
    )
    thinks = True
