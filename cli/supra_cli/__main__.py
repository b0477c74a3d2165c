"""``python -m supra_cli``, for torchrun and for environments without the console command."""

from supra_cli.main import app

if __name__ == "__main__":
    app(prog_name="supra")
