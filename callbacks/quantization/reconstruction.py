"""The optimisation of one window: what is learned, and by which loss (spec 2.5, 2.9)."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from callbacks.quantization.blocks import BlockStack
from callbacks.quantization.branches import Branches
from callbacks.quantization.grid import SMALLEST_STEP
from callbacks.quantization.layers import LearnedLayer
from callbacks.quantization.losses import hidden_error, reconstruction_loss
from callbacks.quantization.ranks import average
from callbacks.quantization.rounding import LearnedRounding, beta_at
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
        learned = settings.learned_segments(len(branches))
        self.learned, self.held_out = range(learned), range(learned, len(branches))

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
    def measure(self, segments: range) -> dict[str, float]:
        """Loss and squared errors against full precision of the hard weights, on some segments."""
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
        totals /= len(segments)
        return dict(zip(("loss", "mse", "mse_without_token_0"), totals.tolist(), strict=True))

    def groups(self, total: int) -> list[dict[str, Any]]:
        """What is learned by which rate, for `total` steps."""
        settings = self.settings
        share = 1 / total if settings.rates_per_window else 1.0
        directions = [part for rounding in self.roundings for part in rounding.rounding_parameters()]
        steps = [part for rounding in self.roundings for part in rounding.step_parameters()]
        activations = [layer.activation.step for layer in self.layers if layer.activation.step is not None]
        groups: list[dict[str, Any]] = [
            {"params": directions, "lr": share * settings.lr_rounding},
            {"params": steps, "lr": share * settings.lr_weight_step},
            {"params": activations, "lr": share * settings.lr_act_step},
        ]
        return [group for group in groups if group["params"]]

    def optimise(self, number: int, generator: torch.Generator) -> int:
        """`epochs` passes over the segments in a seeded order; the rates fall to 0.

        With `held_out` segments the state with the lowest error on them stays, that of the start included.

        Args:
            number: of the window, for messages.
            generator: of the order.

        Returns:
            The passes after which that state was reached.

        Raises:
            RuntimeError: a loss is not finite.
        """
        settings = self.settings
        batches = math.ceil(len(self.learned) / settings.batch_size)
        total = settings.epochs * batches
        groups = self.groups(total)
        if not groups:
            return 0
        adam = settings.optimizer == "adam"
        optimizer = torch.optim.Adam(groups) if adam else torch.optim.SGD(groups)
        schedule = LambdaLR(optimizer, lambda step: rate_share(step, total, settings.rate_decay))
        best = Best(self)
        for passed in range(settings.epochs):
            order = torch.randperm(len(self.learned), generator=generator)
            for batch, indices in enumerate(order.split(settings.batch_size)):
                self._step(optimizer, indices, passed * batches + batch, total, number)
                schedule.step()
            if best.stops(passed + 1):
                break
        for rounding in self.roundings:
            rounding.hard = True
        return best.restore(settings.epochs)

    def _step(self, optimizer: Optimizer, indices: Tensor, step: int, total: int, number: int) -> None:
        """One step of the optimiser."""
        loss = self._step_loss(indices, step, total)
        if not bool(torch.isfinite(loss)):
            (start, end), rates = self.window, [group["initial_lr"] for group in optimizer.param_groups]
            raise RuntimeError(
                f"The reconstruction loss is {loss.item()} in window {number} (blocks {start}.."
                f"{end - 1}), step {step} of {total}, with learning rates {rates}. Lower them, or "
                "calibrate in float32."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        average(gradients)
        if self.settings.optimizer == "sign_sgd":
            for gradient in gradients:
                gradient.sign_()
        optimizer.step()
        self._clamp_steps()

    def _step_loss(self, indices: Tensor, step: int, total: int) -> Tensor:
        """L_rec, and L_com while the rounding is soft."""
        settings = self.settings
        hard = step >= settings.hard_start * total
        loss = self.loss(indices, self._run(indices, hard))
        learns = any(rounding.rounding_parameters() for rounding in self.roundings)
        if not hard and settings.lambda_com and learns:
            beta = beta_at(step, total, settings.beta_start, settings.beta_end, settings.beta_warmup)
            soft = [rounding for rounding in self.roundings if isinstance(rounding, LearnedRounding)]
            penalties = torch.stack([rounding.penalty(beta) for rounding in soft])
            loss = loss + settings.lambda_com * penalties.mean()
        return loss

    def _clamp_steps(self) -> None:
        """Keep all steps positive after an optimiser step."""
        for rounding in self.roundings:
            rounding.clamp_steps()
        for layer in self.layers:
            if layer.activation.step is not None:
                layer.activation.step.data.clamp_(min=SMALLEST_STEP)


def rate_share(step: int, total: int, decay: Literal["cosine", "linear"]) -> float:
    """Share of the rates in a step; it ends at 0."""
    return (1 + math.cos(math.pi * step / total)) / 2 if decay == "cosine" else 1 - step / total


class Best:
    """The state of a window with the lowest error on its held-out segments; without any, the last one.

    Args:
        task: the window.
    """

    def __init__(self, task: Reconstruction) -> None:
        self._task = task
        self._parameters = [p for group in task.groups(1) for p in group["params"]]
        self._passes, self._error = 0, math.inf
        self._state: list[Tensor] = []
        self.stops(0)

    def stops(self, passes: int) -> bool:
        """Look at the state after some passes; whether the error has not fallen for `patience` of them."""
        if not self._task.held_out:
            return False
        error = self._task.measure(self._task.held_out)["loss"]
        if error < self._error:
            self._passes, self._error = passes, error
            self._state = [parameter.detach().clone() for parameter in self._parameters]
        patience = self._task.settings.patience
        return bool(patience) and passes - self._passes >= patience

    def restore(self, passes: int) -> int:
        """Go back to the best state, where segments are held out; the passes after which it was reached."""
        if not self._state:
            return passes
        for parameter, value in zip(self._parameters, self._state, strict=True):
            parameter.data.copy_(value)
        return self._passes
