"""`python -m ddg_cli`, for launchers such as torchrun that want a module."""

from ddg_cli.main import main

main()
