"""A Jupyter-first laboratory for the training objectives of diffusion models

Modules:

- `minsnr_nb.capture`: The source of something that a notebook defines, with all that it needs, as a module that stands alone.
- `minsnr_nb.durable`: The one place where the package writes, renames or removes files.
- `minsnr_nb.own_code`: Own code that a config names or a notebook defines: found, loaded as modules of its own, and captured.
- `minsnr_nb.pm_engine`: Papermill's engine for studies: strict parameters, honest records, atomic saves.
- `minsnr_nb.strict_yaml`: YAML read strictly: no tags, no key twice, `1e-4` a float, `on` a string, and budgets on size and depth."""

__version__ = "0.1.0"
