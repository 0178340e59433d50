"""The command line: one file per group of commands, `show` draws tables, `main` puts them together."""
