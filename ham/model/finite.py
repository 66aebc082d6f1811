"""One check for everything that reads a text with a model: were its numbers numbers?"""

from __future__ import annotations

from torch import Tensor

from ham.errors import NotFiniteError
from ham.model.language_model import LanguageModel


def check_finite(model: LanguageModel, logits: Tensor) -> None:
    """Refuse what a model with broken numbers computes; waits for the device.

    A NaN is no error to `argmax` and below every threshold, so tokens and shares would come out
    and mean nothing.

    Raises:
        RoutingError: If a routing score since the last call was NaN or infinite; names the layers.
        NotFiniteError: If a logit is.
    """
    model.check_scores()
    bad = logits.numel() - int(logits.isfinite().sum())
    if bad:
        raise NotFiniteError(
            f"{bad} of {logits.numel()} logits of {model.config.arm!r} are NaN or infinite; the "
            "model's weights or the numbers it computes with are broken"
        )
