#!/usr/bin/env bash
# lightning 2.6.6: EMAWeightAveraging averages integer buffers of a module like weights and cuts off the fraction, so a
# counter that a module keeps stands still far below the truth when the averages are copied back at the end of fit.
# Seen for a counter of training steps, 20 steps at decay 0.9: 10.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet "torch==2.14.1" "lightning==2.6.6" "numpy==2.4.6"
venv/bin/python -W ignore - <<'PYTHON'
import logging

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Counting(LightningModule):
    """Keeps how many training steps it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def training_step(self, batch, batch_idx):
        self.seen += 1
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


module = Counting()
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = Trainer(accelerator="cpu", max_steps=20, callbacks=[EMAWeightAveraging(decay=0.9)], **quiet)
trainer.fit(module, torch.utils.data.DataLoader(torch.ones(80, 2), batch_size=4))
print(f"steps {trainer.global_step}, counted {int(module.seen)}")
assert (trainer.global_step, int(module.seen)) == (20, 10)
PYTHON
