"""Zero-shot (ZS in BOLAA, arXiv 2308.05960): the actions explained, no example, no thought."""

from xlam_jax.evaluate.agents._words import WordsAgent


class ZeroShot(WordsAgent):
    about = "acts from the description of the actions alone (arXiv 2308.05960)"
    format = "Answer with one line and nothing else:\nAction: name[argument]"
    shows_examples = False
