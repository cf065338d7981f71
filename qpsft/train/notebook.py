"""What a notebook shows while a run trains."""

from __future__ import annotations

import io
import time
from typing import Any

from transformers import TrainerCallback

from qpsft.errors import QpsftError
from qpsft.train.plot import training_figure


class LivePlot(TrainerCallback):
    """Draws NLL, entropy, clip fraction and KL below the cell, anew as log lines come.

    ```python
    trainer = PSFTTrainer(model, args=config, train_dataset=rows, callbacks=[LivePlot()])
    ```

    Args:
        title: above the plots.
        every: seconds between two drawings at least; the last one always comes.
        dpi: of the picture, which is kept in the notebook.

    Raises:
        QpsftError: IPython is not installed.
    """

    def __init__(self, title: str = "", *, every: float = 5.0, dpi: int = 60):
        try:
            from IPython.display import Image, display
        except ImportError as error:
            raise QpsftError("LivePlot draws in notebooks, and IPython is not installed.", "Leave it out.") from error
        self._display, self._image = display, Image
        self.title, self.every, self.dpi = title, every, dpi
        self._lines: list[dict] = []
        self._handle: Any = None
        self._drawn = float("-inf")

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        self._lines, self._handle, self._drawn = [], None, float("-inf")

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or not {"nll", "eval_loss", "guard_limit"} & logs.keys():
            return
        self._lines.append({"step": state.global_step, **logs})
        if time.monotonic() - self._drawn >= self.every:
            self._draw()

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        if self._lines:
            self._draw()

    def _draw(self) -> None:
        png = io.BytesIO()
        training_figure(self._lines, self.title).savefig(png, dpi=self.dpi, format="png")
        image = self._image(data=png.getvalue(), format="png")
        if self._handle is None:
            self._handle = self._display(image, display_id=True)
        else:
            self._handle.update(image)
        self._drawn = time.monotonic()
