"""One module a verb of the command line, each a plain typed function: ``from transcnn.commands.train import train``."""
