"""A Jupyter-first laboratory for the training objectives of diffusion models

Modules:

- `minsnr_nb.durable`: The one place where the package writes, renames or removes files.
- `minsnr_nb.pm_engine`: Papermill's engine for studies: strict parameters, honest records, atomic saves."""

__version__ = "0.1.0"
