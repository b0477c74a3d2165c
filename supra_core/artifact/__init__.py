"""The folder that supra writes, and the files in it for stock loaders."""
