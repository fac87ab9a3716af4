"""`python -m deit_ray` is the command line."""

from deit_ray.cli.main import main

main()
