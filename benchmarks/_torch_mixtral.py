"""The PyTorch side of the training-step benchmark: the Mixtral of `transformers`, in several variants."""

from contextlib import nullcontext
from time import perf_counter

import torch
import transformers
from _worker import CLIP_NORM, LEARNING_RATE, MODEL, WEIGHT_DECAY, batches


class Eager:
    """Experts run one after the other, without torch.compile. Parameters are float32; bf16 uses autocast."""

    experts = "eager"
    compiled = False
    bf16 = "autocast"  # or "copy": the step runs on a bf16 copy of f32 parameters; or "pure": only bf16 parameters

    def __init__(self, precision: str) -> None:
        torch.manual_seed(0)
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.mode = self.bf16 if precision == "bf16" else "f32"
        config = transformers.MixtralConfig(**MODEL, output_router_logits=True, use_cache=False)
        config._attn_implementation = "sdpa"
        config._experts_implementation = self.experts
        self.model = transformers.MixtralForCausalLM(config).train()
        if self.mode == "pure":
            self.model.bfloat16()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.forward = torch.compile(self.compute_loss) if self.compiled else self.compute_loss
        self.batches = batches()
        self.steps(1)

    def compute_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross-entropy plus the routers' auxiliary loss."""
        arguments = {"input_ids": inputs, "labels": targets, "shift_labels": targets}
        if self.mode != "copy":
            return self.model(**arguments).loss
        weights = {name: weight.bfloat16() for name, weight in self.model.named_parameters()}
        return torch.func.functional_call(self.model, weights, kwargs=arguments).loss

    def steps(self, count: int) -> list[float]:
        """Takes `count` training steps and returns the seconds each took."""
        seconds = []
        for _ in range(count):
            inputs, targets = map(torch.from_numpy, next(self.batches))
            start = perf_counter()
            self.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16) if self.mode == "autocast" else nullcontext():
                loss = self.forward(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.optimizer.step()
            self.loss = loss.item()
            seconds.append(perf_counter() - start)
        return seconds


class EagerCompiled(Eager):
    compiled = True


class Grouped(Eager):
    """Experts run as grouped matrix products, which stay in float32 because autocast does not apply to them."""

    experts = "grouped_mm"


class GroupedCompiled(Grouped):
    compiled = True


class GroupedCopyCompiled(GroupedCompiled):
    bf16 = "copy"


class GroupedPureCompiled(GroupedCompiled):
    bf16 = "pure"
