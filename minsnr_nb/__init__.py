"A Jupyter-first laboratory for the training objectives of diffusion models."

__version__ = "0.1.0"
