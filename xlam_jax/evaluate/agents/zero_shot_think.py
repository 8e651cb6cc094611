"""Zero-shot-think (ZST in BOLAA, arXiv 2308.05960): a thought before each action (arXiv 2205.11916), no examples."""

from xlam_jax.evaluate.agents._text import TextAgent


class ZeroShotThink(TextAgent):
    about = "thinks step by step before each action, without examples (arXiv 2308.05960, 2205.11916)"
    format = (
        "Think step by step about what to do next, then act. Answer with two lines:\nThought: …\nAction: name[argument]"
    )
    shows_examples = False
    thinks = True
