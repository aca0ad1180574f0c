"One weighting and one callback, registered when this module is imported"

from torch import Tensor

from minsnr_nb.callbacks import CALLBACKS
from minsnr_nb.config import Positive
from minsnr_nb.minsnr_loss import WEIGHTINGS
from minsnr_nb.train_loop import Callback, Loop, StepResult


@WEIGHTINGS.register
def example_saturating(
    snr: Tensor,  # Signal-to-noise ratio, any shape, >= 0
    *,
    half: Positive = 5.0,  # The SNR at which half of the final weight is reached
) -> Tensor:  # Weight on the x0 error, like `snr`; 1 where there is hardly any noise
    "rises like SNR, then stays at 1: snr / (snr + half)"
    return snr / (snr + half)


@CALLBACKS.register
class example_largest(Callback):
    "Largest weighted loss of a batch, in units of its mean"

    order = 25  # before log_events, which writes what it finds

    def after_step(self, loop: Loop, result: StepResult) -> None:
        if loop.due(loop.cfg.train.log_every):
            largest = result.weighted.max() / result.weighted.mean()
            loop.scalars["example/largest"] = float(largest)
