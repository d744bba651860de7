"""``python -m ptq4dit_jax.cli``, the same as ``ptq4dit``."""

from ptq4dit_jax.cli import entry

if __name__ == "__main__":
    entry()
