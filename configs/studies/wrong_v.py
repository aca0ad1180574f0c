"A weighting that public trainers apply by mistake: the factor for eps on a network that predicts v"

from minsnr_nb.analysis.known_wrong import BUG_eps_formula_on_v
from minsnr_nb.minsnr_loss import WEIGHTINGS

WEIGHTINGS.register("eps_formula_on_v")(BUG_eps_formula_on_v)
