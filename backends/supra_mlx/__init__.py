"""On-device recurrent inference with MLX, standing on mlx-lm."""
