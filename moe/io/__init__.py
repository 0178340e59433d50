"""What is read and written: files and tensors whole or not at all, dataclasses as TOML, pages and pictures."""
