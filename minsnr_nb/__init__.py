"""A Jupyter-first laboratory for the training objectives of diffusion models

Modules:

- `minsnr_nb.durable`: The one place where the package writes, renames or removes files.
- `minsnr_nb.pm_engine`: Papermill's engine for studies: strict parameters, honest records, atomic saves.
- `minsnr_nb.strict_yaml`: YAML read strictly: no tags, no key twice, `1e-4` a float, `on` a string, and budgets on size and depth."""

__version__ = "0.1.0"
