"""The `evit-fast` command: main.py dispatches, every other file is one command."""
