"""Models wherever they stand: opened, told apart, and traced to their teacher."""
