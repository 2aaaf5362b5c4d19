"""Written by scripts/build-wheel from Cargo.toml."""

__version__ = "0"
