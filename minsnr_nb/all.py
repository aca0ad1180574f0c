"What one wants at hand in a notebook: `from minsnr_nb.all import *`."

from minsnr_nb.api import (
    cache_latents,
    continue_run,
    eval_run,
    fork_run,
    load_network,
    open_pipeline,
    recon,
    resume_run,
    sample_run,
    train_run,
)
from minsnr_nb.callbacks import CALLBACKS
from minsnr_nb.config import Config
from minsnr_nb.errors import ConfigError, MinsnrError
from minsnr_nb.data import DATASETS, ImageSet, pixels
from minsnr_nb.diffusion import add_noise, convert, eps_from, x0_from
from minsnr_nb.ema import WRAPPERS
from minsnr_nb.evaluate import Evaluator, report
from minsnr_nb.images.codec import CODECS
from minsnr_nb.record.events import read_events, to_frame
from minsnr_nb.analysis.explorer import explore
from minsnr_nb.lab import LANES, Lab, build, load
from minsnr_nb.metrics import METRICS
from minsnr_nb.minsnr_loss import WEIGHTINGS, loss_weight
from minsnr_nb.objective import DENSITIES, Objective, make_objective, probe_loss, snr_bins
from minsnr_nb.pipeline.pipeline import Pipeline, Strip
from minsnr_nb.record.index import runs_df
from minsnr_nb.record.checks import check_run
from minsnr_nb.record.directory import Run, list_runs, open_run
from minsnr_nb.samplers import SAMPLERS, denoiser, sample
from minsnr_nb.schedule import SCHEDULES, NoiseSchedule, zero_terminal_snr
from minsnr_nb.seeds import Stream, stream
from minsnr_nb.show import curves, image_grid, side_by_side
from minsnr_nb.study import compare, history, run_grid, run_seeds, run_study, verdict
from minsnr_nb.sweep.engine import run_sweep
from minsnr_nb.sweep.verdict import sentences, verdict_of
from minsnr_nb.toy import Gaussian, GaussianMixture
from minsnr_nb.train_loop import Callback, Loop, train
from minsnr_nb.uncertainty import UNCERTAINTIES
from minsnr_nb.unet import MODELS

__all__ = [
    "CALLBACKS", "CODECS", "Callback", "Config", "ConfigError", "DATASETS", "DENSITIES", "Evaluator", "Gaussian",
    "GaussianMixture", "ImageSet", "LANES", "Lab", "Loop", "METRICS", "MODELS", "MinsnrError",
    "NoiseSchedule", "Objective", "Pipeline", "Run", "SAMPLERS", "SCHEDULES", "Stream", "Strip", "UNCERTAINTIES", "WEIGHTINGS", "WRAPPERS",
    "add_noise", "build", "cache_latents", "check_run", "compare", "continue_run", "convert", "curves", "denoiser",
    "eps_from", "eval_run", "explore", "fork_run", "history", "image_grid", "list_runs", "load", "load_network", "loss_weight",
    "make_objective", "open_pipeline", "open_run", "pixels", "probe_loss", "read_events", "recon", "report", "resume_run", "run_grid", "run_seeds",
    "run_study", "run_sweep", "runs_df", "sample", "sample_run", "sentences", "side_by_side", "snr_bins", "stream", "to_frame", "train",
    "train_run", "verdict", "verdict_of", "x0_from", "zero_terminal_snr",
]  # fmt: skip
