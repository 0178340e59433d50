"""`python -m moe` is `moe`."""

from moe.cli.main import main

main()
