"""PlanAct (BOLAA, arXiv 2308.05960; after plan-and-solve, arXiv 2305.04091): a plan first, then actions."""

from xlam_jax.evaluate.agents._text import TextAgent


class PlanAct(TextAgent):
    about = "writes a plan, then follows it (arXiv 2308.05960)"
    format = "Now act by the plan. Answer with one line and nothing else:\nAction: name[argument]"
    plans = True
