"""cxrdist: chest X-ray foundation models, fine-tuned on many GPUs, from a folder of X-rays to a submission."""

__version__ = "0.1.0"
