"""What a training run shows on the terminal."""

from __future__ import annotations

import io

from rich.console import Console

from jquant.qat.metrics import StepRecord
from jquant.qat.progress import shown_progress


def test_loss_pace_and_time_to_the_end() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, legacy_windows=False)
    with shown_progress(console) as listen:
        for step in (1, 2):
            listen(
                StepRecord(
                    step=step,
                    steps=4,
                    loss=0.5 / step,
                    parts={},
                    grad_norm=1.0,
                    learning_rate=1e-3,
                    per_second=1234.5,
                    unit="tokens",
                    evaluation={"perplexity": 36.0026} if step == 2 else {},
                )
            )
    shown = text.getvalue()
    for part in (
        "training",
        "2/4",
        "loss 0.2500",
        "1,234 tokens/s",
        "0:00:0",
        "step 2: loss 0.2500  perplexity 36.0026",
    ):
        assert part in shown, part
