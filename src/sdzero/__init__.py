"""SD-Zero: self-distillation from binary rewards, as a PyTorch Lightning framework."""

__version__ = "0.1.0"
