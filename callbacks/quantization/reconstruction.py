"""The optimisation of one window: what is learned, and by which loss (spec 2.5, 2.9)."""

import math
from typing import Any

import torch
from torch import Tensor

from callbacks.quantization.blocks import BlockStack
from callbacks.quantization.branches import Branches
from callbacks.quantization.grid import SMALLEST_STEP
from callbacks.quantization.layers import LearnedLayer
from callbacks.quantization.losses import hidden_error, reconstruction_loss
from callbacks.quantization.ranks import average
from callbacks.quantization.rounding import beta_at
from callbacks.quantization.settings import CrossBlockSettings


class Reconstruction:
    """The blocks `start` .. `end - 1`, whose output is brought near to the targets.

    Args:
        stack: of the network.
        branches: the inputs and targets of the window.
        window: (start, end).
        layers: learned layers of the window, in place and active.
        settings: see `CrossBlockSettings`.
    """

    def __init__(
        self,
        stack: BlockStack,
        branches: Branches,
        window: tuple[int, int],
        layers: list[LearnedLayer],
        settings: CrossBlockSettings,
    ) -> None:
        self.stack = stack
        self.branches = branches
        self.window = window
        self.layers = layers
        self.settings = settings
        self.roundings = [layer.rounding for layer in layers if layer.rounding is not None]

    def loss(self, indices: Any, output: Tensor) -> Tensor:
        """L_rec of some segments."""
        skip = self.settings.skip_first_tokens
        target, homologous = self.branches.targets(indices)
        return reconstruction_loss(
            target[:, skip:],
            None if homologous is None else homologous[:, skip:],
            output[:, skip:],
            l2=self.settings.loss_l2,
            kl=self.settings.loss_kl,
        )

    def _run(self, indices: Any, hard: bool) -> Tensor:
        for rounding in self.roundings:
            rounding.hard = hard
        return self.stack.run(*self.window, self.branches.inputs(indices), indices)

    @torch.no_grad()
    def measure(self, segments: int) -> dict[str, float]:
        """Loss and squared errors against full precision of the hard weights, on the first segments."""
        states = [rounding.hard for rounding in self.roundings]
        totals = torch.zeros(3, dtype=torch.float64)
        for indices in self.branches.batches(segments):
            output = self._run(indices, hard=True)
            target, _ = self.branches.targets(indices)
            errors = (
                self.loss(indices, output),
                hidden_error(target, output, kl=False),
                hidden_error(target[:, 1:], output[:, 1:], kl=False),
            )
            totals += len(output) * torch.stack([error.double().cpu() for error in errors])
        for rounding, state in zip(self.roundings, states, strict=True):
            rounding.hard = state
        average([totals])
        return dict(zip(("loss", "mse", "mse_without_token_0"), (totals / segments).tolist(), strict=True))

    def _groups(self) -> list[dict[str, Any]]:
        settings = self.settings
        directions = [part for rounding in self.roundings for part in rounding.rounding_parameters()]
        steps = [rounding.scale for rounding in self.roundings if settings.learn_steps]
        activations = [layer.activation.step for layer in self.layers if layer.activation.step is not None]
        groups: list[dict[str, Any]] = [
            {"params": directions, "lr": settings.lr_rounding},
            {"params": steps, "lr": settings.lr_weight_step},
            {"params": activations, "lr": settings.lr_act_step},
        ]
        return [group for group in groups if group["params"]]

    def optimise(self, number: int, generator: torch.Generator) -> None:
        """`epochs` passes over the segments in a seeded order; Adam, cosine to 0.

        Args:
            number: of the window, for messages.
            generator: of the order.

        Raises:
            RuntimeError: a loss is not finite.
        """
        settings, (start, end) = self.settings, self.window
        groups = self._groups()
        if not groups:
            return
        parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.Adam(groups)
        rates = [group["lr"] for group in groups]
        batches = math.ceil(len(self.branches) / settings.batch_size)
        total = settings.epochs * batches
        for step in range(total):
            if step % batches == 0:
                order = torch.randperm(len(self.branches), generator=generator)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / total)) / 2
            first = step % batches * settings.batch_size
            loss = self._step_loss(order[first : first + settings.batch_size], step, total)
            if not bool(torch.isfinite(loss)):
                raise RuntimeError(
                    f"The reconstruction loss is {loss.item()} in window {number} (blocks {start}.."
                    f"{end - 1}), step {step} of {total}, with learning rates {rates}. Lower them, or "
                    "calibrate in float32."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average(p.grad for p in parameters if p.grad is not None)
            optimizer.step()
            self._clamp_steps()
        for rounding in self.roundings:
            rounding.hard = True

    def _step_loss(self, indices: Tensor, step: int, total: int) -> Tensor:
        """L_rec, and L_com while the rounding is soft."""
        settings = self.settings
        hard = step >= settings.hard_start * total
        loss = self.loss(indices, self._run(indices, hard))
        learns = any(rounding.rounding_parameters() for rounding in self.roundings)
        if not hard and settings.lambda_com and learns:
            beta = beta_at(step, total, settings.beta_start, settings.beta_end, settings.beta_warmup)
            penalties = torch.stack([rounding.penalty(beta) for rounding in self.roundings])
            loss = loss + settings.lambda_com * penalties.mean()
        return loss

    def _clamp_steps(self) -> None:
        """Keep all steps positive after an optimiser step."""
        for rounding in self.roundings:
            rounding.clamp_steps()
        for layer in self.layers:
            if layer.activation.step is not None:
                layer.activation.step.data.clamp_(min=SMALLEST_STEP)
