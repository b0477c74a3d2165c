"""What a supra model is: its spec, its tensors, its reference and its file formats.

Importing this package pulls in neither torch nor mlx.
"""

__version__ = "0.1.0"
