"""longspan: stretch a pretrained language model to a longer context, verified and resumable."""

__version__ = "0.1.0"
