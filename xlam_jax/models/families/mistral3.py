"""Mistral Small 3.1 and later, and Ministral 3 as published: a text model with a vision encoder."""

from xlam_jax.models.families.base import Wrapper

WRAPPER = Wrapper(
    architecture="Mistral3ForConditionalGeneration",
    default_text="mistral",
    texts=frozenset({"mistral", "ministral3"}),
    prefixes={
        "language_model.": "",  # in published files, and in those that transformers writes
        "model.language_model.": "model.",  # as transformers 5 names its parameters
    },
    others=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
