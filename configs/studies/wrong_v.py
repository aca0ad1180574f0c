"A weighting that public trainers apply by mistake: the factor for eps on a network that predicts v"

from minsnr_nb.analysis.known_wrong import taken_for
from minsnr_nb.config import Positive
from minsnr_nb.minsnr_loss import WEIGHTINGS, Snr, Weight


@WEIGHTINGS.register
def eps_formula_on_v(
    snr: Snr,
    *,
    gamma: Positive = 5.0,  # Of Min-SNR
) -> Weight:
    "min(1, γ/SNR), which is right for eps, on the v loss"
    return taken_for("min_snr", "eps", "v", snr, gamma=gamma)
