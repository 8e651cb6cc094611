"""Zero-shot (ZS in BOLAA, arXiv 2308.05960): descriptions of the actions, no examples, no thoughts."""

from xlam_jax.evaluate.agents._text import TextAgent


class ZeroShot(TextAgent):
    about = "acts from the description of the actions alone (arXiv 2308.05960)"
    format = "Answer with one line and nothing else:\nAction: name[argument]"
    shows_examples = False
