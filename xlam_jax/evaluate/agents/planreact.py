"""PlanReAct (BOLAA, arXiv 2308.05960): a plan first, then a thought before each action."""

from xlam_jax.evaluate.agents._text import TextAgent


class PlanReAct(TextAgent):
    about = "writes a plan, then thinks before each action (arXiv 2308.05960)"
    format = (
        "Now act by the plan; change it where what is observed asks for it. Answer with two lines:\n"
        "Thought: …\nAction: name[argument]"
    )
    thinks = True
    plans = True
