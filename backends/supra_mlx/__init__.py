"""On-device recurrent inference with MLX, standing on mlx-lm."""

import os

# An M5 would multiply float32 as TF32; MLX reads this at its first product and never again.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
