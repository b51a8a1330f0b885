"""`python -m dsv4_jax.cli`."""

from .app import main

main()
