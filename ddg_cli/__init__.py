"""The `ddg` command: parse, call, print."""
